"""`grail export --to gguf`: what is written is read by transformers, by the gguf package and (where it is installed) by
llama.cpp, and is the same network with the same words."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import grail
from grail.cli import app
from grail.convert import convert
from grail.errors import GrailError
from grail.families.gguf import halved, interleaved
from grail.serving import gguf as export_room
from grail.serving.gguf import export_gguf
from grail.serving.vocabulary import SPLITS, vocabulary
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_model

pytestmark = pytest.mark.usefixtures("reopen_here")
runner = CliRunner()
TEXT = ["the quick brown fox jumps over the lazy dog 12345 times, don't they?", "été naïve 100 200\n\n\tdef f(x):"] * 40
SPECIAL = ["<unk>", "<s>", "</s>"]
VOCABULARY = 400


def byte_level(*steps) -> Tokenizer:
    """BPE on bytes; steps before ByteLevel decide how text is split."""
    tokenizer = Tokenizer(models.BPE())
    own = any(isinstance(step, pre_tokenizers.Split) for step in steps)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not own)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=390, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """What LLaMA-2 has: BPE on characters with bytes to fall back on, a ▁ for each space and one in front."""
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence(spaces)
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL))
    described = json.loads(trained.to_str())["model"]
    bytes_ = {f"<0x{value:02X}>": 3 + value for value in range(256)}
    rest = {token: 256 + number for token, number in described["vocab"].items() if number >= 3}
    vocab = {token: described["vocab"][token] for token in SPECIAL} | bytes_ | rest
    merges = [tuple(merge) for merge in described["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def with_tokenizer(folder, tokenizer: Tokenizer, **more):
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **more).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A compressed network with words of its own: four of six heads of size 8 on a hidden size of 48. Of five
    transformers would read no GGUF."""
    path = tmp_path_factory.mktemp("small")
    source = tiny_checkpoint(path / "dense", num_key_value_heads=6, vocab_size=VOCABULARY)
    with_tokenizer(source, byte_level())
    data = tiny_calibration(path / "data.safetensors")
    options = {"attn_ratio": 0.34, "mlp_ratio": 0.3, "calibration": str(data), "eval": "none"}
    grail.compress(str(source), output=str(path / "out"), **options)
    return path / "out"


@torch.no_grad()
def logits(folder, **options) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    ids = torch.arange(40)[None] * 7 % VOCABULARY
    return model(ids).logits


def fields(file) -> dict:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


class TestTheNetwork:
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(None, 0.0), ("float16", 2e-2), ("bfloat16", 2e-1), ("q8_0", 2e-1)]
    )
    def test_transformers_reads_the_same_logits(self, small, tmp_path, dtype, tolerance):
        told = export_gguf(small, tmp_path / "m.gguf", dtype=dtype)
        assert json.loads((small / "config.json").read_text())["num_attention_heads"] == 4
        wanted = logits(small)
        difference = (logits(tmp_path, gguf_file="m.gguf") - wanted).abs().max() / wanted.abs().max()
        assert difference <= tolerance
        assert (told["dtype"], told["bytes"]) == (dtype or "float32", (tmp_path / "m.gguf").stat().st_size)
        assert (told["difference"] == 0.0) == (dtype is None)

    def test_hyperparameters(self, small, tmp_path):
        export_gguf(small, tmp_path / "m.gguf", dtype="float16")
        found = fields(tmp_path / "m.gguf")
        assert found["general.architecture"] == "llama" and found["general.file_type"] == 1
        assert found["llama.attention.head_count"] == found["llama.attention.head_count_kv"] == 4
        assert found["llama.attention.key_length"] == found["llama.rope.dimension_count"] == 8
        assert found["llama.embedding_length"] == 48 and found["llama.block_count"] == 2
        assert found["llama.feed_forward_length"] == 28 and found["llama.context_length"] == 128

    def test_whole_blocks_only_are_quantised(self, tmp_path):
        source = tiny_checkpoint(tmp_path / "dense", hidden_size=64, num_attention_heads=4, vocab_size=VOCABULARY)
        with_tokenizer(source, byte_level())
        export_gguf(source, tmp_path / "m.gguf", dtype="q8_0")
        kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
        assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
        assert kinds["blk.0.ffn_down.weight"] == "F16"  # 40 numbers to a row
        assert kinds["blk.0.ffn_norm.weight"] == "F32"

    @pytest.mark.parametrize("model_type", ["qwen2", "seed_oss", "mistral"])
    def test_other_types_and_biases(self, model_type, tmp_path):
        model = tiny_model(model_type, vocab_size=VOCABULARY)
        model.save_pretrained(tmp_path / "dense")
        with_tokenizer(tmp_path / "dense", byte_level())
        export_gguf(tmp_path / "dense", tmp_path / "m.gguf")
        found = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
        attention = model.model.layers[1].self_attn
        for mine, theirs, heads in (("attn_q", "q_proj", 6), ("attn_k", "k_proj", 2)):
            projection = getattr(attention, theirs)
            kinds = {"weight": projection.weight} | ({"bias": projection.bias} if projection.bias is not None else {})
            for kind, wanted in kinds.items():
                rows = found[f"blk.1.{mine}.{kind}"]
                # row 2 i of a head is its row i, row 2 i + 1 the one half a head further
                order = [8 * head + half * 4 + i for head in range(heads) for i in range(4) for half in range(2)]
                assert torch.equal(rows, wanted[order])
        assert ("blk.1.attn_v.bias" in found) == (attention.v_proj.bias is not None)

    def test_turned_numbers_and_back(self):
        rows = torch.arange(3 * 8 * 5.0).view(24, 5)
        assert torch.equal(halved(interleaved(rows, 3), 3), rows)
        assert torch.equal(halved(interleaved(rows[:, 0], 3), 3), rows[:, 0])

    def test_stretched_frequencies_of_llama3(self, tmp_path):
        rope = {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }  # fmt: skip
        source = tiny_checkpoint(tmp_path / "dense", rope_parameters=rope, vocab_size=VOCABULARY)
        with_tokenizer(source, byte_level())
        export_gguf(source, tmp_path / "m.gguf")
        (found,) = [t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "rope_freqs.weight"]
        assert found[0] == pytest.approx(1.0) and found[-1] == pytest.approx(8.0) and len(found) == 4

    def test_linear_scaling_and_a_sliding_window(self, tmp_path, caplog):
        rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
        source = tiny_checkpoint(
            tmp_path / "dense", "mistral", rope_parameters=rope, vocab_size=VOCABULARY, sliding_window=32
        )
        with_tokenizer(source, byte_level())
        export_gguf(source, tmp_path / "m.gguf")
        found = fields(tmp_path / "m.gguf")
        assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 2.0)
        assert found["llama.context_length"] == 32
        (said,) = [record.getMessage() for record in caplog.records if "sliding_window" in record.getMessage()]
        assert str(source) in said and "no place for sliding_window 32; the file's context_length is 32" in said

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
    @pytest.mark.parametrize("number", [1e-5, 1e-7, 1e-10, 1e-40])
    def test_a_channel_that_does_next_to_nothing(self, tmp_path, dtype, number):
        model = tiny_model(vocab_size=VOCABULARY, hidden_size=64, num_attention_heads=4)
        model.model.layers[0].mlp.up_proj.weight.data[3] *= number
        model.save_pretrained(tmp_path / "dense")
        told = export_gguf(with_tokenizer(tmp_path / "dense", byte_level()), tmp_path / "m.gguf", dtype=dtype)
        assert told["difference"] < 0.01, "of the numbers that matter"
        (found,) = [t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.ffn_up.weight"]
        row = torch.tensor(gguf.quants.dequantize(found.data, found.tensor_type))[3]
        wanted = model.model.layers[0].mlp.up_proj.weight[3]
        assert torch.allclose(row, wanted, rtol=0, atol=max(wanted.abs().max().item() / 127, 2**-18))

    def test_of_widths_that_differ_after_padding(self, tmp_path):
        source = tiny_checkpoint(tmp_path / "dense", vocab_size=VOCABULARY)
        with_tokenizer(source, byte_level())
        data = tiny_calibration(tmp_path / "data.safetensors")
        options = {"calibration": str(data), "eval": "none", "allocation": "global"}
        grail.compress(str(source), ratio=0.4, output=str(tmp_path / "out"), **options)
        with pytest.raises(GrailError, match="--to padded"):
            export_gguf(tmp_path / "out", tmp_path / "m.gguf")
        convert(tmp_path / "out", tmp_path / "padded", to="padded")
        export_gguf(tmp_path / "padded", tmp_path / "m.gguf")
        assert torch.equal(logits(tmp_path, gguf_file="m.gguf"), logits(tmp_path / "padded"))


class TestWords:
    @pytest.mark.parametrize(
        ("steps", "pre"),
        [
            ([], "gpt-2"),
            ([pre_tokenizers.Digits(individual_digits=True)], "smollm"),
            *[([pre_tokenizers.Split(Regex(pattern), "isolated")], name) for pattern, name in SPLITS.items()],
        ],
    )
    def test_bytes(self, tmp_path, steps, pre):
        tokenizer = byte_level(*steps)
        found = vocabulary(with_tokenizer(tmp_path, tokenizer, chat_template="{{ messages }}"), VOCABULARY)
        assert (found.model, found.pre, found.chat_template) == ("gpt2", pre, "{{ messages }}")
        assert found.tokens[: tokenizer.get_vocab_size()] == [
            tokenizer.id_to_token(n) for n in range(tokenizer.get_vocab_size())
        ]
        assert found.types[:4] == [3, 3, 3, 1] and found.tokens[-1] == f"[PAD{VOCABULARY - 1}]" and found.types[-1] == 5
        assert found.special == {"bos": 1, "eos": 2, "unknown": 0} and found.adds == {"bos": False, "eos": False}
        assert found.merges[0].count(" ") == 1 and not found.scores

    def test_a_word_that_looks_like_a_filler(self, tmp_path):
        tokenizer = byte_level()
        tokenizer.add_tokens([f"[PAD{VOCABULARY - 1}]"])
        found = vocabulary(with_tokenizer(tmp_path, tokenizer), VOCABULARY)
        assert len(set(found.tokens)) == VOCABULARY

    def test_added_words_and_a_bos(self, tmp_path):
        from tokenizers.processors import TemplateProcessing

        tokenizer = byte_level()
        tokenizer.add_tokens(["grail"])
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        found = vocabulary(with_tokenizer(tmp_path, tokenizer), VOCABULARY)
        assert found.types[found.tokens.index("grail")] == 4
        assert found.adds == {"bos": True, "eos": False}

    @settings(max_examples=200, deadline=None)
    @given(st.text(st.sampled_from("the quickbrownfx doé12345,'?\nß"), max_size=40))
    def test_sentencepiece_by_llama_cpp_s_own_rule(self, tmp_path_factory, text):
        found, tokenizer = spm(tmp_path_factory)
        assert (found.model, found.pre, found.space_prefix) == ("llama", "default", True)
        if text:
            assert merged(found, text) == tokenizer.encode(text, add_special_tokens=False).ids

    def test_through_transformers(self, small, tmp_path):
        export_gguf(small, tmp_path / "m.gguf")
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
        ours = AutoTokenizer.from_pretrained(small)
        for text in TEXT[:2]:
            assert theirs(text).input_ids == ours(text).input_ids


_SPM: list = []


def spm(tmp_path_factory):
    """Made once."""
    if not _SPM:
        tokenizer = sentencepiece()
        _SPM[:] = vocabulary(with_tokenizer(tmp_path_factory.mktemp("spm"), tokenizer), VOCABULARY), tokenizer
    return _SPM


def merged(words, text: str) -> list[int]:
    """llama.cpp's llm_tokenizer_spm: of all neighbours that make a token the one with the highest score, the leftmost
    of equals; what is no token in the end becomes its bytes."""
    ids = {token: number for number, token in enumerate(words.tokens)}
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(words.scores[ids[a + b]], -n) for n, (a, b) in enumerate(pairwise(pieces)) if a + b in ids]
        if not pairs:
            break
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    found = []
    for piece in pieces:
        found += [ids[piece]] if piece in ids else [ids[f"<0x{value:02X}>"] for value in piece.encode()]
    return found


class TestRefused:
    def refuse(self, folder, words, tmp_path, **options):
        with pytest.raises(GrailError, match=words):
            export_gguf(folder, tmp_path / "m.gguf", **options)
        assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*.partial"))

    @pytest.mark.parametrize("model_type", ["qwen3", "smollm3"])
    def test_types_that_compute_something_else(self, model_type, tmp_path):
        self.refuse(tiny_checkpoint(tmp_path / "dense", model_type), model_type, tmp_path)

    def test_no_tokenizer(self, tmp_path):
        self.refuse(tiny_checkpoint(tmp_path / "dense"), "tokenizer.json", tmp_path)

    def test_words_of_another_kind(self, tmp_path):
        from tests.tiny import tiny_tokenizer

        self.refuse(tiny_tokenizer(tiny_checkpoint(tmp_path / "dense")), "BPE", tmp_path)

    def test_a_split_that_is_not_known(self, tmp_path):
        source = tiny_checkpoint(tmp_path / "dense", vocab_size=VOCABULARY)
        with_tokenizer(source, byte_level(pre_tokenizers.Split(Regex(r"\w"), "isolated")))
        self.refuse(source, "convert_hf_to_gguf", tmp_path)

    def test_more_words_than_rows(self, tmp_path):
        source = with_tokenizer(tiny_checkpoint(tmp_path / "dense"), byte_level())
        self.refuse(source, "64 rows", tmp_path)

    def test_too_large_for_float16(self, tmp_path):
        model = tiny_model(vocab_size=VOCABULARY)
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
        model.save_pretrained(tmp_path / "dense")
        self.refuse(with_tokenizer(tmp_path / "dense", byte_level()), "not finite", tmp_path, dtype="float16")

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
    @pytest.mark.parametrize("number", [float("nan"), float("-inf")])
    def test_what_is_no_number(self, tmp_path, dtype, number):
        model = tiny_model(vocab_size=VOCABULARY, hidden_size=64, num_attention_heads=4)
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = number
        model.save_pretrained(tmp_path / "dense")
        self.refuse(with_tokenizer(tmp_path / "dense", byte_level()), "not finite", tmp_path, dtype=dtype)

    @pytest.mark.parametrize(
        ("changed", "words"),
        [
            ({"max_position_embeddings": 2**33}, "context_length"),
            ({"sliding_window": -3}, "sliding_window"),
            ({"sliding_window": "wide"}, "sliding_window"),
            ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "freq_base"),
        ],
    )
    def test_settings_that_cannot_be(self, small, tmp_path, changed, words):
        shutil.copytree(small, tmp_path / "copy")
        config = json.loads((small / "config.json").read_text())
        (tmp_path / "copy" / "config.json").write_text(json.dumps(config | changed))
        self.refuse(tmp_path / "copy", rf"config\.json: .*{words}", tmp_path)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda t: t.update(added_tokens=3),
            lambda t: t["added_tokens"].append({"id": 3}),
            lambda t: t["added_tokens"][0].update(id="7"),
            lambda t: t["model"]["vocab"].update(word="x"),
            lambda t: t["model"]["vocab"].update(word=True),
            lambda t: t["model"].update(merges=[1, 2]),
            lambda t: t.update(normalizer={"type": "Lowercase"}),
            lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}),
            lambda t: t["model"].update(end_of_word_suffix="</w>"),
        ],
    )
    def test_damaged_words_and_such_that_are_changed(self, small, tmp_path, damage):
        shutil.copytree(small, tmp_path / "copy")
        described = json.loads((small / "tokenizer.json").read_text())
        damage(described)
        (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps(described))
        self.refuse(tmp_path / "copy", "tokenizer", tmp_path)

    def test_biases_that_are_why_widths_seem_to_differ(self, tmp_path):
        source = with_tokenizer(tiny_checkpoint(tmp_path / "dense", "mistral", vocab_size=VOCABULARY), byte_level())
        data = tiny_calibration(tmp_path / "data.safetensors")
        grail.compress(str(source), bias=True, calibration=str(data), eval="none", output=str(tmp_path / "out"))
        self.refuse(tmp_path / "out", "--no-bias", tmp_path)

    def test_a_file_for_a_folder(self, small, tmp_path):
        (tmp_path / "there").write_text("mine")
        with pytest.raises(GrailError, match="there is no folder"):
            export_gguf(small, tmp_path / "there" / "m.gguf")

    def test_options(self, small, tmp_path):
        self.refuse(small, "--dtype int3", tmp_path, dtype="int3")
        (tmp_path / "there").write_text("mine")
        with pytest.raises(GrailError, match="--overwrite"):
            export_gguf(small, tmp_path / "there")
        with pytest.raises(GrailError, match="is a folder"):
            export_gguf(small, tmp_path)
        assert (tmp_path / "there").read_text() == "mine"

    def test_a_wrong_block_beside_a_large_number_is_noticed(self, tmp_path, monkeypatch):
        model = tiny_model(vocab_size=VOCABULARY, hidden_size=64, num_attention_heads=4)
        model.model.layers[0].mlp.up_proj.weight.data[:, 0] = 1000.0
        model.save_pretrained(tmp_path / "dense")
        with_tokenizer(tmp_path / "dense", byte_level())
        honest = export_room.Stored.data

        def second_block_lost(self):
            found = honest(self).copy()
            if "blk.0.ffn_up" in self.entry.name:
                found[:, 34:] = 0
            return found

        monkeypatch.setattr(export_room.Stored, "data", second_block_lost)
        self.refuse(tmp_path / "dense", "up_proj.weight is not what it was", tmp_path, dtype="q8_0")

    def test_the_checkpoint_s_own_files(self, tmp_path):
        source = with_tokenizer(tiny_checkpoint(tmp_path / "dense", vocab_size=VOCABULARY), byte_level())
        weights = (source / "model.safetensors").read_bytes()
        for _ in range(2):
            export_gguf(source, source / "m.gguf", overwrite=True)
        with pytest.raises(GrailError, match="a file of the checkpoint itself"):
            export_gguf(source, source / "model.safetensors", overwrite=True)
        assert (source / "model.safetensors").read_bytes() == weights

    def test_what_is_written_wrong_is_noticed(self, small, tmp_path, monkeypatch):
        honest = export_room.Stored.data
        monkeypatch.setattr(
            export_room.Stored,
            "data",
            lambda self: honest(self)[::-1].copy() if "attn_v" in self.entry.name else honest(self),
        )
        self.refuse(small, "v_proj.weight is not what it was", tmp_path)


def test_on_the_command_line(small, tmp_path):
    options = ["--to", "gguf", "--output", str(tmp_path / "m.gguf"), "--dtype", "float16", "--json"]
    done = runner.invoke(app, ["export", str(small), *options])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["dtype"] == "float16"
    done = runner.invoke(app, ["export", str(small), "--output", str(tmp_path / "m.onnx"), "--dtype", "float16"])
    assert done.exit_code == 2 and "--dtype goes with --to gguf" in done.stderr
    done = runner.invoke(app, ["export", str(small), *options, "--tower", "text", "--overwrite"])
    assert done.exit_code == 2 and "--tower" in done.stderr


def test_llama_cpp_gives_the_same_logits(small, tmp_path):
    """Where llama-cpp-python is installed."""
    llama_cpp = pytest.importorskip("llama_cpp")
    export_gguf(small, tmp_path / "m.gguf")
    model = llama_cpp.Llama(str(tmp_path / "m.gguf"), logits_all=True, verbose=False, n_ctx=128)
    for text in TEXT[:2]:
        tokens = model.tokenize(text.encode(), add_bos=False)
        ours = PreTrainedTokenizerFast.from_pretrained(small)(text).input_ids
        assert tokens == ours
        model.reset()
        model.eval(tokens)
        found = torch.tensor(model.scores[: len(tokens)])
        with torch.no_grad():
            wanted = AutoModelForCausalLM.from_pretrained(small).eval()(torch.tensor([tokens])).logits[0]
        assert (found - wanted).abs().max() < 2e-2 * wanted.abs().max()
