"""The parts of the trainer, each of which can be read by itself: `member` (what one trial of a pack
has while it trains), `feeding` (its batches; `supply`: what a device makes them of), `features`
(what need not be computed again), `stepping` (forward, backward, update; on a device `replay`, with
`grouped` for the update), `evaluation` (figures, and which checkpoint is picked).

`fpt.trainer` puts them together; what a layer of a pack does is in `fpt.pack_layers`.
"""
