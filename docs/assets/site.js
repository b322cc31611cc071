// The theme makes these late: a box in which a wide table scrolls, which the keyboard has to reach,
// and the buttons of each block of code. A screen reader lists landmarks by name, so each needs one.
const mend = () => {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap")) box.tabIndex = 0;
  document.querySelectorAll("nav.md-code__nav, nav.md-nav:not([data-md-level='0'])").forEach((nav, n) => {
    nav.dataset.name ??=
      nav.getAttribute("aria-label") ?? nav.querySelector(".md-nav__title")?.textContent.trim() ?? "Code";
    nav.removeAttribute("aria-labelledby");
    nav.setAttribute("aria-label", `${nav.dataset.name}, ${n + 1}`);
  });
};
new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
mend();
