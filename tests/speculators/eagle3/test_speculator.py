"""EAGLE-3: checkpoints in both layouts, training that raises acceptance, drafts that equal an unrolled forward."""

from __future__ import annotations

import json
import re
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from atlas_rl import AtlasRolloutEngine
from atlas_rl.cli import main
from atlas_rl.controller.fixed import FixedController
from atlas_rl.policy.view import InProcessView
from atlas_rl.replay.record import Recorded, RecordingSpeculator, recorded_calls
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.eagle3.checkpoint import load_eagle3, save_eagle3
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.eagle3.unrolling import unrolled
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.training.eagle3 import Eagle3Lesson, TrainSettings, new_head, train
from atlas_rl.training.loop import batches_of
from atlas_rl.training.state import lasting
from tests.models import tiny_bigram, tiny_llama, tiny_qwen3

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 4], [5, 9, 4], [11, 12], [40, 2, 2]]
LAYERS = (1, 2, 3)
EOS = [17]


@cache
def policy():
    return tiny_bigram(layers=4, seed=11)


def settings(**options):
    return TrainSettings(**{"layers": LAYERS, "draft_vocab_size": 60, "unroll": 3, "learning_rate": 4e-3, **options})


def record(folder, model, calls=8):
    recorder = RecordingSpeculator(folder, LAYERS)
    engine = AtlasRolloutEngine(model=model, speculators=[HistorySpeculator(), recorder], console=False)
    for seed in range(calls):
        engine.generate(PROMPTS, num_generations=4, max_new_tokens=24, eos_token_ids=EOS, seed=seed)
        engine.policy_updated()
    return recorded_calls(folder)


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    return record(tmp_path_factory.mktemp("record"), policy())


@pytest.fixture(scope="module")
def training(calls, tmp_path_factory):
    """A trained head, and the folder that its training left."""
    folder = tmp_path_factory.mktemp("work")
    return train(InProcessView(policy()), calls, folder, settings(epochs=6), say=lambda line: None), folder


@pytest.fixture(scope="module")
def head(training):
    return training[0]


def engine_of(model, speculator, k=3, **options):
    controller = FixedController([speculator.name], speculator.name, k)
    return AtlasRolloutEngine(model=model, speculators=[speculator], controller=controller, console=False, **options)


def rollout(engine, seed=99, **options):
    return engine.generate(PROMPTS, num_generations=4, max_new_tokens=24, eos_token_ids=EOS, seed=seed, **options)


@pytest.mark.slow
def test_training_raises_held_out_acceptance(training):
    log = json.loads((training[1] / "training.json").read_text())
    first, last = log["epochs"][0]["acceptance"], log["epochs"][-1]["acceptance"]
    assert last[0] > first[0] + 0.05
    assert last[0] > 0.3


@pytest.mark.slow
def test_an_interrupted_training_goes_on(calls, tmp_path):
    whole = train(InProcessView(policy()), calls, tmp_path / "whole", settings(epochs=2), say=lambda line: None)
    lines = []

    def stop_after_one(line):
        lines.append(line)
        if "held-out" in line:
            raise KeyboardInterrupt

    # The line is said before the state is written: interrupted there, the epoch is lost; one more epoch must not be.
    with pytest.raises(KeyboardInterrupt):
        train(InProcessView(policy()), calls, tmp_path / "parts", settings(epochs=2), say=stop_after_one)
    parts = train(InProcessView(policy()), calls, tmp_path / "parts", settings(epochs=2), say=lambda line: None)
    again = train(InProcessView(policy()), calls, tmp_path / "parts", settings(epochs=2), say=lines.append)
    assert "batch" not in lines[-1]
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(parts.state_dict()[name].float(), tensor.float(), atol=1e-5), name
        assert torch.equal(again.state_dict()[name], parts.state_dict()[name])
    with pytest.raises(ValueError, match="other unroll"):
        train(InProcessView(policy()), calls, tmp_path / "parts", settings(epochs=2, unroll=2), say=lines.append)


def test_a_training_goes_on_in_the_middle_of_an_epoch(calls, tmp_path):
    """Each batch is saved here. What is said after the fifth, how long the rest takes, is where it is interrupted."""
    options = settings(epochs=1, unroll=2)
    whole = train(InProcessView(policy()), calls[:4], tmp_path / "whole", options, say=lambda line: None)
    lines = []

    def stop_at_the_estimate(line):
        lines.append(line)
        if "from here" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(InProcessView(policy()), calls[:4], tmp_path / "parts", options, say=stop_at_the_estimate, save_every_s=0)
    assert re.fullmatch(r"training takes about \d+ (s|min) from here, .*", lines[-1])
    parts = train(InProcessView(policy()), calls[:4], tmp_path / "parts", options, say=lines.append)
    assert "goes on at epoch 1/1, batch 6/9" in lines
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(parts.state_dict()[name].float(), tensor.float(), atol=1e-5), name
    logs = [json.loads((tmp_path / each / "training.json").read_text())["epochs"] for each in ("whole", "parts")]
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], rel=1e-5)


def test_the_time_that_is_left_is_said_in_its_unit():
    assert [lasting(s) for s in (0.4, 89, 600, 12_600)] == ["0 s", "89 s", "10 min", "3.5 h"]


def test_the_policy_is_not_trained(calls, tmp_path):
    model = tiny_bigram(layers=4, seed=11)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(InProcessView(model), calls, tmp_path, settings(epochs=1), say=lambda line: None)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", [Eagle3Speculator, DraftLM])
def test_the_backlog_is_what_a_drafter_has_yet_to_run(head, kind):
    """The prompts at first (the head runs those of siblings once), then what each step commits."""
    seen = []

    class Watched(kind):
        def propose(self, sequences, requests, max_draft_tokens):
            seen.append((self.backlog(sequences, requests), len(requests)))
            return super().propose(sequences, requests, max_draft_tokens)

    rollout(engine_of(policy(), Watched(head) if kind is Eagle3Speculator else Watched(policy(), 64)))
    first, requests = seen[0]
    # The head pairs a feature with the token that follows it, so the newest token waits, and a prompt's last position is
    # each sibling's own; a language model runs all.
    own = sum(len(prompt) - 1 for prompt in PROMPTS) if kind is Eagle3Speculator else 4 * sum(map(len, PROMPTS))
    assert first == own + requests
    assert all(requests <= backlog <= 4 * requests for backlog, requests in seen[1:])


def test_it_drafts_what_training_unrolled(head, calls):
    """The speculator, its cache and its catching up, against the training's forward over whole sequences."""
    recorded = Recorded.load(calls[0])
    logits = {}
    lesson = Eagle3Lesson(InProcessView(policy()), head, settings(batch_size=1))
    by_length = np.argsort(recorded.sequences.lengths)
    with torch.no_grad():
        for request, batch in zip(by_length, batches_of(lesson, calls[:1], None), strict=True):
            for depth, step in enumerate(unrolled(head, batch, 3)):
                places = step.valid[0].nonzero().flatten().tolist()
                logits[int(request), depth] = dict(zip(places, head.logits(step.features), strict=True))
    checked = 0

    class Checking(Eagle3Speculator):
        def propose(self, sequences, requests, max_draft_tokens):
            nonlocal checked
            draft = super().propose(sequences, requests, max_draft_tokens)
            true = recorded.sequences
            for row, request in enumerate(requests):
                length = int(sequences.lengths[request])
                for depth in range(int(draft.lengths[row])):
                    # The chain from position length - 2, as long as what it drafted is what the record holds.
                    if length + depth >= true.lengths[request]:
                        break
                    expected = logits[int(request), depth][length - 2].softmax(dim=-1).max().clamp(0.01, 0.99)
                    assert draft.confidence[row, depth] == pytest.approx(
                        float(expected), abs=3e-3
                    )  # features come back in half precision
                    checked += 1
                    at = length + depth
                    if draft.token_ids[row, depth] != true.token_ids[request, at]:
                        break
            return draft

    engine = engine_of(policy(), Checking(head))
    output = engine.generate(PROMPTS, num_generations=4, max_new_tokens=24, eos_token_ids=EOS, seed=0)
    assert output.completion_ids == [recorded.sequences.completion(n) for n in range(len(output.completion_ids))]
    assert checked > 300
    assert output.report.accepted_length > 1.2


@pytest.mark.parametrize("verification", ["invariant", "rejection"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 5, "temperature": 0.8}])
def test_tokens_do_not_depend_on_it(head, verification, options):
    drafted = rollout(engine_of(policy(), Eagle3Speculator(head), verification=verification), **options)
    assert drafted.report.drafted["eagle3"] > 0
    if verification == "invariant":
        plain = AtlasRolloutEngine(model=policy(), speculation=False, console=False)
        assert rollout(plain, **options).completion_ids == drafted.completion_ids


def test_it_drafts_rarely_asked_and_in_waves(head):
    """Features pile up while others draft, and rows are taken over by waiting requests."""
    engine = AtlasRolloutEngine(
        model=policy(), speculators=[HistorySpeculator(), Eagle3Speculator(head)], console=False, max_batch_size=5
    )
    plain = AtlasRolloutEngine(model=policy(), speculation=False, console=False)
    assert rollout(engine).completion_ids == rollout(plain).completion_ids


def test_a_checkpoint_comes_back(head, tmp_path):
    save_eagle3(tmp_path, head, policy())
    loaded = load_eagle3(tmp_path, InProcessView(policy()))
    for name, tensor in head.state_dict().items():
        assert torch.equal(
            loaded.state_dict()[name], tensor.bfloat16().to(tensor) if tensor.is_floating_point() else tensor
        )
    assert loaded.config.layers == LAYERS
    report = rollout(engine_of(policy(), Eagle3Speculator(tmp_path))).report
    assert report.acceptance_rate == pytest.approx(
        rollout(engine_of(policy(), Eagle3Speculator(head))).report.acceptance_rate, abs=0.05
    )


def test_a_folder_is_all_the_engine_needs(head, tmp_path):
    save_eagle3(tmp_path, head, policy())
    engine = AtlasRolloutEngine(model=policy(), draft_model=tmp_path, console=False)
    report = rollout(engine).report
    assert report.drafted["eagle3"] > 0
    assert set(report.drafted) == {"history", "recurrent", "eagle3"}


def test_the_original_layout_is_read(head, tmp_path):
    save_eagle3(tmp_path, head, policy())
    described = json.loads((tmp_path / "config.json").read_text())
    flat = described["transformer_layer_config"] | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": described["draft_vocab_size"],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(LAYERS)},
    }
    (tmp_path / "config.json").write_text(json.dumps(flat))
    tensors = {
        name.replace("layers.0.", "midlayer."): t for name, t in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_eagle3(tmp_path, InProcessView(policy()))
    assert torch.equal(loaded.fc.weight, head.fc.weight.bfloat16().float())
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert torch.equal(load_eagle3(tmp_path, InProcessView(policy())).fc.weight, loaded.fc.weight)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "config.json").write_text("{}"), "describes no EAGLE-3 head"),
        (lambda folder: (folder / "model.safetensors").unlink(), "neither"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"0" * 99), "damaged"),
    ],
)
def test_a_wrong_checkpoint_is_named(head, tmp_path, damage, message):
    save_eagle3(tmp_path, head, policy())
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_eagle3(tmp_path, InProcessView(policy()))


def test_a_truncated_file_is_named(head, tmp_path):
    save_eagle3(tmp_path, head, policy())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_eagle3(tmp_path, InProcessView(policy()))
    (tmp_path / "model.safetensors").unlink()
    torch.save(load(whole), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for kept in (0, 100, len(whole) // 2):
        (tmp_path / "pytorch_model.bin").write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="damaged"):
            load_eagle3(tmp_path, InProcessView(policy()))


def test_a_head_of_another_policy_is_named(head, tmp_path):
    save_eagle3(tmp_path, head, policy())
    with pytest.raises(ValueError, match="hidden size"):
        load_eagle3(tmp_path, InProcessView(tiny_llama(layers=4, hidden=48)))
    with pytest.raises(ValueError, match="vocabulary"):
        load_eagle3(tmp_path, InProcessView(tiny_llama(layers=4, vocab=70)))
    with pytest.raises(ValueError, match="layer 3"):
        load_eagle3(tmp_path, InProcessView(tiny_llama(layers=2)))


def test_heads_of_other_families_have_the_policys_head_size():
    model = tiny_qwen3(layers=4)
    built = new_head(InProcessView(model), settings(), np.arange(60))
    assert built.config.layer.head_dim == model.config.head_dim


def test_the_command_trains_and_writes_a_checkpoint(tmp_path, capsys):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {f"w{n}": n for n in range(63)} | {"[eos]": 63}
    plain = Tokenizer(WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="[eos]").save_pretrained(tmp_path / "policy")
    policy().save_pretrained(tmp_path / "policy")
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"w{n} w{n + 1} w{n + 2}"}) + "\n" for n in range(24)))
    command = ["train-speculator", "--model", str(tmp_path / "policy"), "--data", str(data)]
    command += ["--output", str(tmp_path / "head"), "--layers", "1", "2", "3", "--max-new-tokens", "16"]
    command += ["--generate-batch", "4", "--draft-vocab-size", "50", "--epochs", "2", "--unroll", "2"]
    main(command)
    assert "written" in capsys.readouterr().out
    report = rollout(engine_of(policy(), Eagle3Speculator(tmp_path / "head"))).report
    assert report.drafted["eagle3"] > 0
    main(command)
    assert "continuations" not in capsys.readouterr().out  # nothing is generated twice
    for wrong, message in ((["--data", "nowhere.jsonl"], "no prompts at"), (["--epochs", "0"], "at least 1")):
        with pytest.raises(SystemExit) as stop:
            main([*command, *wrong])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
