"""What was found wrong for those who call grail from Python, each by itself."""

from __future__ import annotations

import json
import os
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn

import grail
from grail.allocation import shares
from grail.errors import GrailError
from grail.families.base import Producer, Site
from grail.families.fields import whole
from grail.numbers import as_whole, plain
from grail.recipe import Recipe
from grail.reduction import Units
from grail.selectors import selector_class
from grail.surroundings import undisturbed
from tests.tiny import tiny_model

SECRET = "a-token-of-the-script"
WIDTH = 12


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, WIDTH)
        self.fc2 = nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


def inputs() -> torch.Tensor:
    return torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


def compress(model=None, **flags):
    given = {
        "method": "wanda",
        "ratio": 0.5,
        "calibration": inputs(),
        "sites": [grail.channels("fc1", "fc2", width=WIDTH)],
    }
    return grail.compress(MLP() if model is None else model, **given | flags)


def loader(rows):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=10)


def generator(rows):
    yield from rows.split(10)


def token_ids() -> torch.Tensor:
    return torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(0))


class TestReportPickles:
    @pytest.mark.parametrize(
        "given", [loader, generator, list, lambda rows: rows], ids=["loader", "generator", "list", "tensor"]
    )
    def test_a_network_s_without_the_script_s_data(self, given, monkeypatch):
        monkeypatch.setenv("TOKEN", SECRET)
        rows = inputs()
        report = compress(calibration=given(rows) if given is not list else list(rows.split(10)))
        told = pickle.dumps(report)
        assert SECRET.encode() not in told
        assert report.recipe.calibration == report.to_json()["recipe"]["calibration"] == "given in Python"
        assert pickle.loads(told).to_json() == report.to_json()

    @pytest.mark.usefixtures("reopen_here")
    @pytest.mark.parametrize("lent", [True, False], ids=["batches", "tensor"])
    def test_a_language_model_s_without_the_model_s_files(self, lent, monkeypatch):
        monkeypatch.setenv("TOKEN", SECRET)
        ids = token_ids()
        batches = ({"input_ids": part} for part in ids.split(4))
        report = grail.compress(tiny_model(num_hidden_layers=1), calibration=batches if lent else ids, target="hidden")
        told = pickle.dumps(report)
        again = pickle.loads(told)
        assert SECRET.encode() not in told and report.widths.recipe is report.recipe
        assert (again.to_json(), again.run_json()["profile"]) == (report.to_json(), report.run_json()["profile"])
        assert again.summary() == report.summary()
        with again.profile.phase("more"):
            pass


class TestThreads:
    def in_threads(self, *calls):
        failed = []

        def run(call):
            try:
                call()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=run, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed

    def test_calls_wait_for_each_other(self):
        inside, most = [], []

        def call():
            with undisturbed():
                inside.append(1)
                most.append(len(inside))
                threading.Event().wait(0.02)
                inside.pop()

        self.in_threads(call, call, call)
        assert most == [1, 1, 1]

    def test_the_script_s_settings_are_what_they_were(self):
        torch.set_default_dtype(torch.float64)
        try:
            state = torch.get_rng_state()
            models = [MLP().float() for _ in range(3)]
            torch.set_rng_state(state)
            self.in_threads(*(lambda model=model: compress(model) for model in models))
            assert torch.get_default_dtype() == torch.float64 and torch.equal(torch.get_rng_state(), state)
        finally:
            torch.set_default_dtype(torch.float32)

    def test_a_call_within_a_call(self):
        with undisturbed(), undisturbed() as caller, caller.back():
            assert compress().ratio


class TestEnvironment:
    @pytest.fixture(autouse=True)
    def variables(self, monkeypatch):
        for name in ("MEANWHILE", "LIBRARY", "GONE"):
            monkeypatch.setenv(name, "before")
            monkeypatch.delenv(name)
        monkeypatch.setenv("KEPT", "before")

    def elsewhere(self, name, value):
        thread = threading.Thread(target=os.environ.__setitem__, args=(name, value))
        thread.start()
        thread.join()

    def test_what_another_thread_sets_stays(self):
        with undisturbed():
            self.elsewhere("MEANWHILE", "1")
            self.elsewhere("KEPT", "after")
        assert (os.environ["MEANWHILE"], os.environ["KEPT"]) == ("1", "after")

    def test_also_where_the_run_had_set_it_before(self):
        with undisturbed():
            os.environ["LIBRARY"] = os.environ["KEPT"] = "ours"
            self.elsewhere("LIBRARY", "theirs")
        assert (os.environ["LIBRARY"], os.environ["KEPT"]) == ("theirs", "before")

    def test_what_the_run_sets_or_takes_away_is_put_back(self):
        with undisturbed(), undisturbed():
            os.environ["LIBRARY"] = "ours"
            del os.environ["KEPT"]
        assert "LIBRARY" not in os.environ and os.environ["KEPT"] == "before"

    def test_what_the_script_sets_within_stays(self):
        with undisturbed() as caller:
            os.environ["LIBRARY"] = "ours"
            with caller.back():
                os.environ["MEANWHILE"] = "1"
                del os.environ["KEPT"]
        assert os.environ["MEANWHILE"] == "1" and not {"LIBRARY", "KEPT"} & os.environ.keys()


WHOLE = {"numpy": np.int64(5), "small": np.uint8(5), "tensor": torch.tensor(5), "python": 5}
NOT_WHOLE = {
    "truth": True, "numpy-truth": np.True_, "fraction": 2.7, "even": 2.0, "text": "5", "none": None,
    "tensor": torch.tensor(2.5), "array": np.array([1, 2]), "tensors": torch.ones(2),
}  # fmt: skip


class TestNumbers:
    @pytest.mark.parametrize("value", WHOLE.values(), ids=WHOLE)
    def test_a_whole_number_is_one_everywhere(self, value):
        recipe = Recipe("model", samples=value, seed=value, round_to=value)
        method = selector_class("slimgpt").from_options({"batch": value})
        found = [
            as_whole(value),
            recipe.samples,
            recipe.seed,
            recipe.round_to,
            method.batch,
            whole("a", "width", value),
        ]
        assert found == [5] * 6 and {type(number) for number in found} == {int}

    @pytest.mark.parametrize("value", NOT_WHOLE.values(), ids=NOT_WHOLE)
    def test_what_is_none_is_one_nowhere(self, value):
        assert as_whole(value) is None
        with pytest.raises(GrailError, match="--samples must be a whole number"):
            Recipe("model", samples=value)
        with pytest.raises(GrailError, match="width must be a whole number"):
            whole("a", "width", value)
        if not isinstance(value, str):
            with pytest.raises(GrailError, match=r"--set batch=.* of type int"):
                selector_class("slimgpt").from_options({"batch": value})

    @pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.float16(0.5)], ids=lambda v: v.dtype.name)
    def test_fractions_of_numpy(self, value):
        recipe = Recipe("model", ratio=value, attn_ratio=value, ridge=value, alpha=value, set={"damping": value})
        assert {type(v) for v in (recipe.ratio, recipe.attn_ratio, recipe.ridge, recipe.alpha)} == {float}
        assert selector_class("slimgpt").from_options(recipe.set).damping == 0.5
        assert json.loads(json.dumps(recipe.to_json()))["set"] == {"damping": 0.5}

    def test_a_run_with_numbers_of_numpy_is_the_run_with_python_s(self, tmp_path):
        numbers = {"samples": np.int64(20), "seed": np.int32(1), "ratio": np.float32(0.5), "batch": np.int16(7)}
        model = MLP()
        first = compress(model, output=tmp_path / "a", **numbers)
        second = compress(model, output=tmp_path / "b", **{name: value.item() for name, value in numbers.items()})
        assert first.to_json() == second.to_json()
        assert (tmp_path / "a" / "grail.json").read_bytes() == (tmp_path / "b" / "grail.json").read_bytes()

    @pytest.mark.parametrize("value", [False, np.False_, "false"], ids=repr)
    def test_truth_values_of_a_method_s_option(self, value):
        options = Recipe("model", set={"greedy": value}).set
        assert selector_class("slimgpt").from_options(options).greedy is False

    @pytest.mark.parametrize("option", [{"greedy": 1}, {"damping": True}, {"damping": None}], ids=str)
    def test_values_of_another_type_are_refused(self, option):
        with pytest.raises(GrailError, match="expected a value of type"):
            selector_class("slimgpt").from_options(option)

    def test_what_is_no_number_stays(self):
        given = ["0.5", None, 10**400, float("inf")]
        assert [plain(value) for value in given] == given


class TestSentences:
    @pytest.mark.parametrize("structure", ["UL-MM", "AL-MM"])
    def test_flap_with_heads_alone(self, structure):
        flap = selector_class("flap").from_options({"structure": structure, "remove_heads": "1"})
        site = Site("a", "heads", 0, (Producer("qkv", 8),), "proj", Units(1, 4, 8))
        with pytest.raises(GrailError, match=r"remove_heads.*no site has channels"):
            shares([site], Recipe("model", ratio=0.5), {"a": 100}, flap.fixed_heads())

    def test_a_list_of_single_inputs(self):
        with pytest.raises(GrailError, match=r"single inputs of \[8\]; stack them"):
            compress(calibration=list(inputs()))

    @pytest.mark.parametrize(("model", "said"), [(MLP, "the class MLP"), (5, "int"), ([], "list")], ids=str)
    def test_what_is_no_model(self, model, said):
        with pytest.raises(GrailError, match=f"takes a module or a checkpoint's folder or name; got {said}"):
            compress(model)

    def test_no_model(self):
        with pytest.raises(GrailError, match=r"takes a module .* got NoneType"):
            grail.compress(None, output="out")
