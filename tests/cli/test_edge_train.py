import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.cli.main import run
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.edge.export.bundle import Request, make_bundle
from anabranch.edge.runtime.trust import public_bytes
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import (
    Column,
    Contract,
    Federation,
    Lora,
    Model,
    Task,
    Training,
)

LABELS = ("bone", "heart")
WORDS = {"bone": ("fracture", "femur", "left"), "heart": ("heart", "failure", "infarction")}


@dataclass(frozen=True)
class Signed:
    folder: Path
    key: str


def tiny_bert(folder: Path) -> Path:
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel

    letters = [chr(c) for c in range(0x21, 0x7F)]
    words = [word for some in WORDS.values() for word in some]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *words]
    tokenizer = BertWordPieceTokenizer({token: i for i, token in enumerate(tokens)})
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def records(path: Path, n: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    lines = []
    for label in rng.choice(LABELS, size=n):
        text = " ".join(rng.choice(WORDS[str(label)], size=3))
        lines.append(json.dumps({"text": text, "label": str(label)}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    folder = tmp_path_factory.mktemp("edge")
    config = RunConfig(
        name="tiny",
        task=Task(kind="text-classification", labels=LABELS),
        data=Contract(columns={"text": Column(type="text"), "label": Column(type="label")}),
        model=Model(base=str(tiny_bert(folder / "base")), max_tokens=12),
        lora=Lora(rank=2),
        training=Training(learning_rate=0.01, batch_size=8, local_epochs=1),
        federation=Federation(rounds=1),
    )
    classifier = load_classifier(config)
    key = Ed25519PrivateKey.generate()
    make_bundle(
        classifier,
        read_adapter(classifier),
        config,
        folder / "bundle",
        request=Request(
            name="tiny", version=1, precisions=("fp32", "int8"), artifacts=False,
            tolerance={"int8": 0.99},
        ),
        inputs=["heart failure", "left femur"] * 4,
        labels=np.array([1, 0] * 4),
        signing_key=key,
    )  # fmt: skip
    return Signed(folder / "bundle", public_bytes(key).hex())


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = run(["edge", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_train_infer_undo_and_quantize_on_one_device(
    signed: Signed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--home", tmp_path / "home", "--trust", signed.key)
    data = records(tmp_path / "own.jsonl", 60)
    question = ("infer", signed.folder, "heart failure", *where)

    before = told(capsys, *question, "--precision", "fp32")
    assert before["adapter"] == "released"
    done = told(capsys, "train", signed.folder, data, *where, "--steps", "40")
    assert done["kept"]
    assert done["after"]["accuracy"] >= done["before"]["accuracy"]
    assert (done["steps"], len(done["losses"]), done["resumed_at"]) == (40, 40, 0)

    own = told(capsys, *question, "--precision", "fp32")
    assert own["adapter"] == "personal"
    assert own["results"][0]["labels"][0]["label"] == "heart"
    assert own["results"] != before["results"]
    assert told(capsys, *question, "--precision", "fp32", "--released") == before

    out = tmp_path / "own.onnx"
    model = told(capsys, "quantize", signed.folder, out, *where)
    assert model == {
        "model": str(out), "bytes": out.stat().st_size, "precision": "int8", "adapter": "personal"
    }  # fmt: skip

    assert told(capsys, "train", signed.folder, *where, "--undo")["adapter"] == "released"
    assert told(capsys, *question, "--precision", "fp32") == before
    code, _, err = call(capsys, "train", signed.folder, *where, "--undo")
    assert code == 1
    assert "nothing to undo" in err


def test_the_text_names_scores_and_what_is_in_use(
    signed: Signed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--home", tmp_path / "home", "--trust", signed.key)
    data = records(tmp_path / "own.jsonl", 30)
    code, out, _ = call(capsys, "train", signed.folder, data, *where, "--precision", "int8",
                        "--epochs", "2")  # fmt: skip
    assert code == 0
    assert "tiny: 6 steps on 24 records" in out
    assert "accuracy %" in out
    assert "kept" in out
    code, out, _ = call(capsys, "infer", signed.folder, "heart", *where)
    assert code == 0
    assert out.splitlines()[-1].endswith("heart")


@pytest.mark.parametrize(
    "arguments",
    [(), ("data.csv", "--undo"), ("data.csv", "--steps", "1", "--epochs", "1"),
     ("data.csv", "--steps", "0"), ("data.csv", "--precision", "int2")],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(signed: Signed, arguments: tuple[str, ...]) -> None:
    assert run(["edge", "train", str(signed.folder), *arguments]) == 2


def test_mistakes_are_one_line_and_exit_code_1(
    signed: Signed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = ("--home", tmp_path / "home")
    trust = ("--trust", signed.key)
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\nheart,lung\n")
    for arguments, message in (
        ((bad, *home, *trust), "bad.csv, line 2: column 'label': expected one of 'bone', 'heart'"),
        ((tmp_path / "none.csv", *home, *trust), "cannot be read"),
        ((bad, *home), "no key is trusted"),
        ((bad, *home, "--trust", "0" * 64), "does not trust"),
        (
            (records(tmp_path / "r.jsonl", 9), *home, *trust, "--memory-mb", "1"),
            "the limit is 1 MB",
        ),
        ((tmp_path / "r.jsonl", *home, *trust, "--precision", "int4"), "no graph train_step.int4"),
        ((tmp_path / "r.jsonl", *home, *trust, "--engine", "ort-training"), "artifacts"),
    ):
        code, out, err = call(capsys, "train", signed.folder, *arguments)
        assert code == 1
        assert out == ""
        assert message in err
        assert err.count("\n") == 1


def test_a_changed_bundle_is_not_opened(
    signed: Signed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in signed.folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "adapter.bin").write_bytes(b"x" + (copy / "adapter.bin").read_bytes()[1:])
    code, _, err = call(capsys, "infer", copy, "heart", "--home", tmp_path, "--trust", signed.key)
    assert code == 1
    assert "adapter.bin" in err


def test_a_device_trains_where_torch_and_onnx_cannot_be_imported(
    signed: Signed, tmp_path: Path
) -> None:
    data = records(tmp_path / "own.jsonl", 20)
    script = """
import sys
for name in ("torch", "onnx", "transformers", "flwr", "scipy"):
    sys.modules[name] = None
from anabranch.cli.main import run
sys.exit(run(sys.argv[1:]))
"""
    where = ["--home", str(tmp_path / "home"), "--trust", signed.key, "--json"]
    for arguments in (["train", str(signed.folder), str(data)], ["infer", str(signed.folder), "a"]):
        done = subprocess.run(
            [sys.executable, "-c", script, "edge", *arguments, *where],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)
