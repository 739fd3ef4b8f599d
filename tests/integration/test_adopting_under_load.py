"""A version may come while a forward is under way: the first one that has vectors asks the model for their places."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from p2pmodel import starter
from p2pmodel.domain.ids import Digest, VersionId
from p2pmodel.domain.swarm import Span
from p2pmodel.engine.checkpoint import read_checkpoint
from p2pmodel.engine.stage import load_stage
from p2pmodel.engine.versions import VersionTable
from p2pmodel.tensors import ia3


def test_a_version_can_be_put_during_a_forward() -> None:
    span = Span(0, 2)
    stage = load_stage(read_checkpoint(starter.MODEL), span)
    name, shape = next((slot.name, slot.shape) for slot in ia3.find_slots(stage.base) if ".0." in slot.name)
    table, version = VersionTable(stage), VersionId(Digest("1" * 64))
    inside, going_on = threading.Event(), threading.Event()

    def pause(*_: Any) -> None:
        inside.set()
        assert going_on.wait(20)

    hook = stage.base.get_submodule(stage.checkpoint.stack)[0].register_forward_pre_hook(pause)  # type: ignore[index]
    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        forward = pool.submit(stage.forward, torch.zeros(1, 2, stage.width), None, span)
        assert inside.wait(20)
        put = pool.submit(table.put, version, {name: torch.full(shape, 2.0)})
        assert not put.done() or put.exception() is None
        going_on.set()
        put.result(20)
        forward.result(20)
    hook.remove()
    assert table.get(version)[name].eq(2).all()
