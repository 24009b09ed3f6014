"""README.md of an output: accepted by the hub's own card classes, whatever the source's card says."""

from __future__ import annotations

import copy
import json
import time

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import grail
from grail.checkpoint.gguf import _write_card
from grail.checkpoint.locate import SMOLLM2, SMOLLM2_HUB, _smollm2_file, locate
from grail.convert import convert
from grail.page.card import card
from grail.page.run import Run
from grail.page.source_card import CARRIED, SourceCard, source_card
from tests.test_report_page import example, ran
from tests.tiny import tiny_calibration, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("reopen_here")

BASE = """---
license: other
license_name: llama2
license_link: LICENSE.txt
language: [en, de]
base_model: some/older
tags: [chat]
---
# The base

```
# Citation
not a heading
```

## How to cite

Please cite us:

```bibtex
@misc{base, title={# Base}}
## no heading either
```

### And the data

@misc{data}

## Contact

nobody
"""


def read(content: str) -> ModelCard:
    """Through the hub's class, with metadata that its documentation allows."""
    found = ModelCard(content)
    assert set(found.data.to_dict()) <= {
        "license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "base_model", "tags",
        "model-index",
    }  # fmt: skip
    assert ModelCard(str(found)).data.to_dict() == found.data.to_dict()
    return found


def shown(base: SourceCard | None = None, /, **changed) -> ModelCard:
    return read(card(Run("out", copy.deepcopy(example()) | changed, ran()), base or SourceCard()))


def of_text(tmp_path, content: str | bytes) -> SourceCard:
    (tmp_path / "README.md").write_bytes(content if isinstance(content, bytes) else content.encode())
    return source_card(tmp_path)


class TestWhatItSays:
    def test_metric_data_and_what_it_is(self):
        data = shown().data
        (result,) = data.eval_results
        assert (result.metric_type, result.metric_value) == ("perplexity", 21.2)
        assert (result.dataset_type, result.dataset_args) == ("builtin", {"windows": 4, "seq_len": 32})
        assert (data.pipeline_tag, data.library_name) == ("text-generation", "transformers")
        assert "pruning" in data.tags

    def test_table_command_and_snippet(self):
        text = shown().text
        assert "| perplexity on Python documentation (built in) | 13.19 | 153.80 | 21.20 |" in text
        assert "| parameters | 1.0 M |  | 700.0 k (−30.0 %) |" in text
        assert "grail compress \\\n  --model some/model" in text
        assert "AutoModelForCausalLM.from_pretrained('out')" in text
        assert "CPAL 2026" in text and "independent implementation" in text

    def test_class_file_needs_trust(self):
        assert "trust_remote_code=True" in shown(format="grail").text
        assert "trust_remote_code" not in shown().text

    def test_nothing_measured_is_no_result(self):
        found = shown(evaluation=None)
        assert found.data.eval_results is None and "perplexity on" not in found.text

    def test_what_was_only_pruned_is_not_called_repaired(self):
        recipe = example()["recipe"] | {"compensate": False}
        text = shown(recipe=recipe).text
        assert "nothing was repaired" in text and "was repaired in closed form" not in text

    @pytest.mark.parametrize("key", list(example()))
    def test_a_field_less_is_a_part_less(self, key):
        read(card(Run("out", {k: v for k, v in example().items() if k != key}), SourceCard()))

    def test_names_that_are_markdown(self):
        entry = example()["source"] | {"id": "/home/me/a`|b```c\n# d", "sha256": "x"}
        evaluation = example()["evaluation"] | {"data": "/home/me/my | *text*.txt"}
        found = shown(source=entry, evaluation=evaluation)
        assert "/home/me" not in found.text.split("## How it was made")[0]
        assert "\n# d" not in found.text
        assert "my \\| \\*text\\*.txt" in found.text


class TestBase:
    def test_a_run_that_fetched_it_names_it(self):
        entry = {"id": "llama-2-7b", "revision": "abc", "hub": "meta-llama/Llama-2-7b-hf"}
        assert shown(source=entry).data.base_model == ["meta-llama/Llama-2-7b-hf"]

    def test_a_folder_that_looks_like_a_hub_name_is_none(self):
        assert shown(source={"id": "some/model", "revision": None}).data.base_model is None

    def test_else_what_its_card_says(self, tmp_path):
        assert shown(of_text(tmp_path, BASE)).data.base_model == ["some/older"]

    def test_smollm2_is_known(self, monkeypatch):
        monkeypatch.setattr("grail.checkpoint.locate._from_gguf", lambda file: file)
        monkeypatch.setattr("grail.checkpoint.locate._smollm2_file", lambda: "here")
        assert locate(SMOLLM2).hub == SMOLLM2_HUB


class TestRights:
    def test_licence_languages_and_citation_are_carried(self, tmp_path):
        found = shown(of_text(tmp_path, BASE))
        data = found.data
        assert (data.license, data.license_name, data.language) == ("other", "llama2", ["en", "de"])
        assert data.license_link == "https://huggingface.co/some/older/blob/main/LICENSE.txt"
        carried = found.text.split(f"### {CARRIED}")[1]
        assert "@misc{base, title={# Base}}\n## no heading either" in carried and "@misc{data}" in carried
        assert "nobody" not in found.text and "not a heading" not in found.text

    def test_a_link_to_a_file_that_came_along_stays(self, tmp_path):
        (tmp_path / "LICENSE.txt").write_text("terms")
        found = read(card(Run("out", example()), of_text(tmp_path, BASE), tmp_path))
        assert found.data.license_link == "LICENSE.txt"

    def test_a_card_of_ours_passes_on_what_it_carries_and_no_more(self, tmp_path):
        once = str(shown(of_text(tmp_path, BASE)))
        twice = str(shown(of_text(tmp_path, once)))
        assert twice == once
        assert twice.count("tang2026grail") == 1

    def test_no_card_says_that_it_is_not_known(self):
        found = shown()
        assert found.data.license is None and "did not say which" in found.text

    def test_gguf_states_its_own(self, tmp_path):
        _write_card(_smollm2_file(), tmp_path)
        found = source_card(tmp_path)
        assert found.licence == {"license": "apache-2.0"} and found.language == ["en"]


class TestAnyReadme:
    @given(st.one_of(st.binary(), st.text().map(str.encode), st.text().map(lambda t: f"---\n{t}\n---\n{t}".encode())))
    def test_bytes(self, tmp_path_factory, raw):
        shown(of_text(tmp_path_factory.mktemp("base"), raw))

    @given(
        st.dictionaries(
            st.sampled_from(["license", "license_name", "license_link", "language", "base_model", "tags"]),
            st.recursive(
                st.none() | st.booleans() | st.floats() | st.text() | st.dates(), lambda inner: st.lists(inner)
            ),
        ),
        st.sampled_from(["# Citation\n", "```\n# Citation\n", "## cite\n# x\n", ""]),
    )
    def test_metadata(self, tmp_path_factory, metadata, body):
        content = f"---\n{yaml.safe_dump(metadata, allow_unicode=True)}---\n{body}"
        shown(of_text(tmp_path_factory.mktemp("base"), content.encode(errors="replace")))

    @pytest.mark.parametrize(
        "entry",
        ["x: !!bool maybe", 'x: !!int ""', 'x: !!float ""', "x: !!timestamp soon", "x: !!binary '='", "? [a]\n: b"],
    )
    def test_tags_are_not_followed(self, tmp_path, entry):
        assert of_text(tmp_path, f"---\n{entry}\n---\n") == SourceCard()

    def test_names_that_no_file_holds(self, tmp_path):
        found = of_text(tmp_path, '---\nlicense: "a\\ud800"\nlicense_name: "a\\0b"\nlicense_link: "a\\n---"\n---\n')
        assert found == SourceCard()
        assert of_text(tmp_path, "---\nlicense: null\nlanguage: no\n---\n") == SourceCard(language=["no"])

    def test_a_link_longer_than_a_name_can_be(self, tmp_path):
        link = "a" * 290
        source = of_text(tmp_path, f"---\nbase_model: a/b\nlicense_link: {link}\n---\n")
        assert f"license_link: https://huggingface.co/a/b/blob/main/{link}" in card(
            Run("s", example()), source, tmp_path
        )

    def test_a_heading_of_blanks_is_read_at_once(self, tmp_path):
        begun = time.monotonic()
        assert of_text(tmp_path, "# a" + " " * 100_000 + "b\n# Citation" + " #" * 50_000 + "\nme").citation == "me"
        assert time.monotonic() - begun < 30

    def test_too_large(self, tmp_path):
        assert of_text(tmp_path, BASE + "x" * 2**20) == SourceCard()

    def test_a_name_written_a_billion_times(self, tmp_path):
        levels = "".join(f"{chr(97 + n)}: &{chr(97 + n)} [{', '.join([f'*{chr(96 + n)}'] * 9)}]\n" for n in range(1, 9))
        found = of_text(tmp_path, f"---\na: &a [x, x]\n{levels}language: *i\n---\n")
        assert found.language == []


class TestWritten:
    def test_by_a_run(self, tmp_path):
        source = tiny_checkpoint(tmp_path / "dense")
        (source / "README.md").write_text(BASE)
        data = tiny_calibration(tmp_path / "data.safetensors")
        grail.compress(str(source), ratio=0.5, calibration=str(data), eval=str(data), output=str(tmp_path / "small"))
        found = read((tmp_path / "small" / "README.md").read_text())
        record = json.loads((tmp_path / "small" / "grail.json").read_text())
        assert found.data.license_name == "llama2"
        assert found.data.eval_results[0].metric_value == round(record["evaluation"]["perplexity"]["compressed"], 4)
        assert found.text.startswith("\n# small") and "of the channels" in found.text

    def test_by_a_conversion(self, tmp_path):
        source = tiny_checkpoint(tmp_path / "dense")
        data = tiny_calibration(tmp_path / "data.safetensors")
        small = str(tmp_path / "small")
        grail.compress(str(source), ratio=0.5, calibration=str(data), eval="none", output=small)
        (tmp_path / "small" / "README.md").write_text(BASE)
        convert(small, str(tmp_path / "grail"), to="grail")
        found = read((tmp_path / "grail" / "README.md").read_text())
        assert "trust_remote_code=True" in found.text and found.data.license_name == "llama2"

    def test_of_a_network_in_memory(self, tmp_path):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.act, self.last = nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)

            def forward(self, x):
                return self.last(self.act(self.first(x)))

        site = grail.channels("first", "last", width=16)
        grail.compress(Net(), sites=[site], calibration=torch.randn(64, 6), output=str(tmp_path / "small"), eval="none")
        found = read((tmp_path / "small" / "README.md").read_text())
        assert found.data.library_name == "grail"
        assert "grail.load('small', module=the_original_module)" in found.text
