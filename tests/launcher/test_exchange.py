"""Weights that leave for Hugging Face's layout, and come back, are the same model."""

import json
import shutil

import pytest
import torch
import transformers

from armillary.errors import CheckpointError
from armillary.launcher.exchange import export, import_
from armillary.launcher.job import resolve
from armillary.launcher.run import Run
from armillary.model.multimodal import Inputs
from armillary.storage import LocalStorage
from armillary.training.checkpoint.load import Reader
from armillary.training.inference import load_model
from armillary.training.loop import Assignment, Trainer
from armillary.training.process_group import Rank, join
from tests.conftest import refused
from tests.data_pipeline.test_tokenizer import TOKENIZER as DATA_TOKENIZER
from tests.groups import checkpoint_of
from tests.launcher.test_run import DATA

MODELS = {
    "grouped": {"num_query_groups": 2, "rope_theta": 5000.0, "norm_eps": 1e-6},
    "tied": {"tied_embeddings": True, "num_query_groups": 4},
}
EXPERTS = {"num_experts": 2}


def trained(tables, folder, model):
    """A checkpoint after a step, so that norms are no longer one."""
    job = resolve(tables | {"model": tables["model"] | model}, "test").train_job()
    join(Rank(), job.parallel)
    trainer = Trainer(Assignment("exchange", job, "hash", Rank(), folder, None, 1))
    trainer.train_step()
    checkpoint_of(trainer, folder / "step-00000001")
    trainer.close()
    return LocalStorage(folder / "step-00000001")


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tables, tmp_path_factory):
    return trained(tables, tmp_path_factory.mktemp(request.param), MODELS[request.param])


def logits(checkpoint, tokens_T):
    model, job = load_model(checkpoint)
    shape = job.image_shape
    count = len(tokens_T)
    inputs = Inputs(
        tokens_T, torch.arange(count), torch.tensor([0, count], dtype=torch.int32),
        torch.zeros(0, shape.patches, shape.patch_dim), torch.zeros(0, dtype=torch.long),
    )  # fmt: skip
    with torch.no_grad():
        return model(inputs)[:, 0]


def test_transformers_loads_it_and_has_the_same_logits(checkpoint, tmp_path):
    export(checkpoint, DATA_TOKENIZER, tmp_path / "out", True, "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert isinstance(theirs, transformers.LlamaForCausalLM)
    tokens_T = torch.randint(0, theirs.config.vocab_size, (97,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens_T[None]).logits[0], logits(checkpoint, tokens_T), atol=1e-4, rtol=0)
    said = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode("blue circle", add_special_tokens=False)
    assert said == DATA_TOKENIZER.encode("blue circle")


@pytest.mark.parametrize("llama", [True, False])
def test_what_was_exported_comes_back_bit_by_bit(checkpoint, tmp_path, llama, monkeypatch):
    monkeypatch.setattr("armillary.launcher.exchange.SHARD_BYTES", 50_000)
    export(checkpoint, None, tmp_path / "out", llama, "float32")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    if llama:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    import_(tmp_path / "out", tmp_path / "step-00000000")
    before, after = Reader(checkpoint), Reader(LocalStorage(tmp_path / "step-00000000"))
    assert set(before.keys) == set(after.keys)
    for key in before.keys:
        wanted = before.whole(key) if key.startswith("weight/") else torch.zeros(before.shape(key))
        assert torch.equal(after.whole(key), wanted), key


def test_a_llama_of_transformers_comes_in(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope_theta=1234.0,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "llama")
    model = import_(tmp_path / "llama", tmp_path / "step-00000000")
    assert (model.rope_theta, model.num_query_groups, model.depth) == (1234.0, 2, 2)
    tokens_T = torch.arange(50)
    with torch.no_grad():
        wanted = theirs(tokens_T[None]).logits[0]
    torch.testing.assert_close(logits(LocalStorage(tmp_path / "step-00000000"), tokens_T), wanted, atol=1e-4, rtol=0)


def test_what_cannot_be_had_is_refused(tables, tmp_path, armillary):
    for config, word in (
        (transformers.LlamaConfig(attention_bias=True), "attention_bias = True"),
        (transformers.LlamaConfig(rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope_type = 'linear'"),
        (transformers.LlamaConfig(head_dim=64), "head_dim = 64"),
        (transformers.GPT2Config(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    ):
        if isinstance(config, transformers.LlamaConfig):
            config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(tmp_path / "config")
        with pytest.raises(CheckpointError, match=word):
            import_(tmp_path / "config", tmp_path / "to")
    with pytest.raises(CheckpointError, match="no configuration"):
        import_(tmp_path / "nowhere", tmp_path / "to")
    experts = trained(tables, tmp_path / "experts", EXPERTS)
    with pytest.raises(CheckpointError, match="no experts"):
        export(experts, None, tmp_path / "out", True, "float32")
    assert not (tmp_path / "out").exists()
    export(experts, None, tmp_path / "out", False, "float32")
    with pytest.raises(CheckpointError, match="something already"):
        export(experts, None, tmp_path / "out", False, "float32")
    (tmp_path / "out" / "model.safetensors").unlink()
    refused(armillary("checkpoint", "import", "out", "again"), "there is no", "in its files")


def test_an_export_of_a_damaged_checkpoint_leaves_nothing(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint.at(), copy)
    (file,) = copy.glob("*.bin")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="corrupted"):
        export(LocalStorage(copy), None, tmp_path / "out", True, "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_run_begins_with_weights(tables, checkpoint, tmp_path):
    model = Reader(checkpoint).manifest.state.job["model"]
    start = {"checkpoint": {"start": checkpoint.at()}, "model": model}
    job = resolve(tables | start, "test").train_job()
    join(Rank(), job.parallel)
    trainer = Trainer(Assignment("begun", job, "hash", Rank(), tmp_path, None, 1))
    trainer.close()
    reader, parts = Reader(checkpoint), set()
    assert trainer.step == 0
    for part, block in trainer.engine.state():
        saved = reader.region(f"{part}/{block.name}", block.start, tuple(block.tensor.shape))
        assert torch.equal(block.tensor, saved if part == "weight" else torch.zeros_like(saved)), (part, block.name)
        parts.add(part)
    assert len(parts) == 3


def test_the_commands(tables, tmp_path, armillary):
    checkpoint = trained(tables, tmp_path / "trained", {})
    run = Run.create(tmp_path / "run", resolve(tables, "test"), DATA)
    done = armillary("checkpoint", "export", checkpoint.at(), "out", "--dtype", "bfloat16", "--json")
    assert json.loads(done.stdout)["config"]["model_type"] == "llama"
    assert armillary("checkpoint", "import", "out", "back").returncode == 0
    assert "is whole" in armillary("checkpoint", "verify", "back").stdout
    refused(armillary("checkpoint", "export", run.path, "other"), "no checkpoint yet")
    refused(armillary("checkpoint", "export", checkpoint.at(), "out"), "something already")
