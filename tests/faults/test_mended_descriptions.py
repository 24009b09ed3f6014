"""What was found in descriptions of networks and their proofs, and in networks that are loaded into given modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import grail
from grail.errors import GrailError
from tests.faults.test_mended_networks import MLP, MLP_SITES, compressed, net, rows


class Turned(MLP):
    """Turns its input by a matrix that no file holds."""

    def __init__(self):
        super().__init__()
        turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3)))[0]
        self.register_buffer("turn", turn, persistent=False)
        self.register_buffer("steps", torch.arange(16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.turn)


class TestBuffersThatAreNotStored:
    def test_go_with_stored_weights_of_16_bits(self, tmp_path):
        report = compressed(net(Turned).half(), output=tmp_path / "out")
        loaded = grail.load(tmp_path / "out", module=Turned())
        assert (loaded.turn.dtype, loaded.steps.dtype) == (torch.float16, torch.int64)
        assert torch.equal(loaded(rows().half()), report.model(rows().half()))

    def test_stay_float32_beside_16_bits_where_they_are_so_in_the_module(self, tmp_path):
        module = net(Turned).half()
        module.turn = module.turn.float()
        compressed(net(Turned).half(), output=tmp_path / "out")
        assert grail.load(tmp_path / "out", module=module).turn.dtype == torch.float32

    def test_without_data_are_refused(self, tmp_path):
        compressed(net(Turned), output=tmp_path / "out")
        module = Turned().to("meta")
        with pytest.raises(GrailError, match=r"buffer turn holds no data.*make the module on the CPU"):
            grail.load(tmp_path / "out", module=module)

    def test_a_module_on_meta_without_any_is_filled(self, tmp_path):
        report = compressed(net(), output=tmp_path / "out", sites=MLP_SITES)
        assert torch.equal(grail.load(tmp_path / "out", module=MLP().to("meta"))(rows()), report.model(rows()))
