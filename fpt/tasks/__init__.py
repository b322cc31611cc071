"""The tasks, written out by hand: name -> class. To add one, write a class and add its line."""

from __future__ import annotations

from fpt.tasks.base import Task
from fpt.tasks.bits import BitMemory, BitXor
from fpt.tasks.homology import RemoteHomology
from fpt.tasks.images import Cifar10, Cifar10Lra, Digits, Mnist
from fpt.tasks.listops import ListOps
from fpt.tasks.text import Text

TASKS: dict[str, type[Task]] = {
    "bit-memory": BitMemory,
    "bit-xor": BitXor,
    "listops": ListOps,
    "mnist": Mnist,
    "cifar10": Cifar10,
    "cifar10-lra": Cifar10Lra,
    "remote-homology": RemoteHomology,
    "digits": Digits,
    "text": Text,
}

TASK_GROUP = "fpt_sweep.tasks"
"""The group of entry points by which an installed package adds tasks of its own."""

__all__ = ["TASKS", "TASK_GROUP", "Task"]
