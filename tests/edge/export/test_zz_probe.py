import json, shutil
import numpy as np, pytest, torch
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.edge.export.joint import check_against_torch, step_graph, infer_graph
from anabranch.edge.export.quantize import quantize_step, quantize_infer
from anabranch.edge.export.artifacts import artifacts
from anabranch.protocols.tables import Lora, Model, Task

def variants(tiny_bert, tmp):
    yield "rank0", dict(lora=Lora(rank=0))
    yield "cls", dict(model=Model(base=str(tiny_bert), max_tokens=24, pooling="cls"))
    yield "last1", dict(lora=Lora(rank=2, layers="last:1"))
    yield "two", dict(task=Task(kind="text-classification", labels=("a", "b")))
    yield "many", dict(task=Task(kind="text-classification", labels=tuple(f"l{i}" for i in range(300))))
    yield "labels13", dict(task=Task(kind="text-classification", labels=tuple(f"l{i}" for i in range(13))))
    yield "maxtok13", dict(model=Model(base=str(tiny_bert), max_tokens=13))
    yield "maxtok4", dict(model=Model(base=str(tiny_bert), max_tokens=4))
    yield "rank24", dict(lora=Lora(rank=24))
    p = tmp / "pad"; shutil.copytree(tiny_bert, p)
    c = json.loads((p/"config.json").read_text()); c["pad_token_id"] = 3; (p/"config.json").write_text(json.dumps(c))
    yield "pad3", dict(model=Model(base=str(p), max_tokens=24))

def test_probe(tiny_bert, tmp_path, make_config):
    bad = []
    for name, ch in variants(tiny_bert, tmp_path):
        try:
            cl = load_classifier(make_config("text", **ch))
            with torch.no_grad():
                for p in cl.parameters():
                    if p.requires_grad: p.normal_(std=.2)
            for clipped in (False, True):
                s = step_graph(cl, clipped=clipped)
                w = check_against_torch(s, cl, clipped=clipped)
                print(name, clipped, w)
                for prec in ("int8", "int4"): quantize_step(s, prec, smallest=64)
                if not clipped:
                    ad = read_adapter(cl)
                    i = infer_graph(s, ad)
                    for prec in ("int8", "int4"): quantize_infer(i, prec, smallest=64)
                    artifacts(cl, ad)
        except Exception as e:
            bad.append((name, repr(e)[:300])); print("BAD", name, repr(e)[:400])
    assert not bad
