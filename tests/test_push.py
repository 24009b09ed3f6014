"""`grail push`: what goes to the hub, and what is said when it does not."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, errors
from typer.testing import CliRunner

import grail
from grail.cli import app
from grail.errors import GrailError
from grail.serving.push import push
from tests.tiny import tiny_calibration, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("reopen_here")
runner = CliRunner()


class Hub:
    """Takes what it is sent."""

    def __init__(self, **trouble):
        self.trouble, self.sent, self.created, self.message = trouble, {}, [], None

    def whoami(self):
        if "login" in self.trouble:
            raise self.trouble["login"]

    def create_repo(self, repo, private, exist_ok):
        self.created.append((repo, private, exist_ok))
        if "create" in self.trouble:
            raise self.trouble["create"]
        return f"https://hub/{repo}"

    def create_commit(self, repo, operations, commit_message):
        self.message = commit_message
        for operation in operations:
            with operation.as_file() as handle:
                self.sent[operation.path_in_repo] = handle.read()


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    return found


@pytest.fixture
def written(tmp_path):
    source = tiny_checkpoint(tmp_path / "dense")
    data = tiny_calibration(tmp_path / "data.safetensors")
    grail.compress(str(source), ratio=0.5, calibration=str(data), eval="none", output=str(tmp_path / "small"))
    return tmp_path / "small"


def test_all_but_what_tells_of_the_machine(hub, written):
    (written / ".cache").mkdir()
    (written / ".cache" / "x").write_text("x")
    told = push(written, "me/small", private=True)
    wanted = {file.name for file in written.iterdir() if file.is_file()} - {"run.json"}
    assert set(hub.sent) == wanted == {file["name"] for file in told["files"]}
    for name, content in hub.sent.items():
        if name != "README.md":
            assert content == (written / name).read_bytes()
    assert hub.created == [("me/small", True, True)]
    assert "wanda-sp" in hub.message and told["url"] == "https://hub/me/small"


def test_no_file_from_outside(hub, written, tmp_path):
    (tmp_path / "secret").write_text("mine")
    for name in ("notes.txt", "README.md"):
        (written / name).unlink(missing_ok=True)
        (written / name).symlink_to(tmp_path / "secret")
        with pytest.raises(GrailError, match=rf"{name} is a link out of the folder"):
            push(written, "me/small")
        (written / name).unlink()
    (written / "again.json").symlink_to("config.json")
    push(written, "me/small")
    assert hub.sent["again.json"] == hub.sent["config.json"]


def test_a_link_that_leads_back_to_itself(hub, written):
    (written / "notes.txt").symlink_to("notes.txt")
    push(written, "me/small")
    assert "notes.txt" not in hub.sent and "grail.json" in hub.sent


def test_what_a_run_left_that_was_cut_off_as_it_finished(hub, written):
    for name in ("store", "replaced"):
        (written / name).mkdir()
        (written / name / "x.safetensors").write_text("x")
    push(written, "me/small")
    assert not [name for name in hub.sent if "/" in name]


@pytest.mark.parametrize("recipe", [None, [], {"method": "\ud800"}, {"method": "x`\n# y"}])
def test_a_record_by_somebody_else(hub, written, recipe):
    (written / "grail.json").write_text(json.dumps({"recipe": recipe, "sites": [], "versions": {"a": "1\n# y"}}))
    push(written, "me/small")
    (written / "README.md").unlink()
    push(written, "me/small")
    assert "\n# y" not in hub.sent["README.md"].decode()


def test_the_card_has_the_name_on_the_hub(hub, written):
    push(written, "me/five-billion")
    found = ModelCard(hub.sent["README.md"].decode())
    assert "from_pretrained('me/five-billion')" in found.text and "# five-billion" in found.text
    assert "from_pretrained('small')" in (written / "README.md").read_text()


def test_an_edited_card_goes_as_it_is(hub, written):
    mine = (written / "README.md").read_text() + "\nMy own words.\n"
    (written / "README.md").write_text(mine)
    push(written, "me/small")
    assert hub.sent["README.md"].decode() == mine


def test_a_dry_run_sends_nothing(hub, written):
    done = runner.invoke(app, ["push", str(written), "me/small", "--dry-run"])
    assert done.exit_code == 0 and "model.safetensors.index.json" in done.stdout and "would go to" in done.stdout
    assert not hub.created and not hub.sent
    document = json.loads(runner.invoke(app, ["push", str(written), "me/small", "--dry-run", "--json"]).stdout)
    assert document["dry_run"] is True and document["schema_version"] == 1


@pytest.mark.parametrize("repo", ["small", "a/b/c", "me/..", "https://huggingface.co/me/small", ""])
def test_names(written, repo):
    with pytest.raises(GrailError, match="OWNER/NAME"):
        push(written, repo)


def test_folders_of_others(tmp_path):
    with pytest.raises(GrailError, match="no folder"):
        push(tmp_path / "nothing", "me/small")
    with pytest.raises(GrailError, match=r"no grail\.json"):
        push(tmp_path, "me/small")
    (tmp_path / "grail.json").write_text('{"recipe": {}, "sites": []}')
    with pytest.raises(GrailError, match="no weights"):
        push(tmp_path, "me/small")


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ({"login": errors.LocalTokenNotFoundError("none")}, "hf auth login"),
        ({"login": ConnectionError("no route")}, "cannot be reached.*no route"),
        ({"create": PermissionError("not yours")}, "me/small could not be uploaded"),
    ],
)
def test_refusals(monkeypatch, written, trouble, words):
    hub = Hub(**trouble)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    with pytest.raises(GrailError, match=words):
        push(written, "me/small")
    assert not hub.sent


def test_offline_without_a_fake(written, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    done = runner.invoke(app, ["push", str(written), "me/small"])
    assert done.exit_code == 2 and "cannot be reached" in done.stderr
