"""The model for lm-evaluation-harness, with the real package and tasks from local files."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input.command import rewrite_file
from conftest import DEMO_MODEL
from transformers import PreTrainedModel

from sedac_runtime import InputError, SedacModel

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from serve.running_server import serving

from sedac_runtime import lm_eval
from sedac_runtime.lm_eval import SedacLM

PAIRS = [
    ("def main():\n", "    return 0"),
    ("import ", "os\n"),
    ("class A:\n    def ", "__init__(self):\n        pass"),
    ("", "def main"),
]
TASK = """\
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def scored(demo_bundle: Path) -> SedacLM:
    return SedacLM(bundle=str(demo_bundle), batch_size=3)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def loglikelihood(
    model: PreTrainedModel, context: list[int], after: list[int]
) -> tuple[float, bool]:
    """What transformers gives."""
    with torch.no_grad():
        logits = model(torch.tensor([context + after])).logits[0, len(context) - 1 : -1]
    chosen = torch.tensor(after)
    total = logits.log_softmax(-1).gather(1, chosen[:, None]).sum().item()
    return total, bool((logits.argmax(-1) == chosen).all())


def test_loglikelihoods_are_transformers(scored: SedacLM, demo_reference: PreTrainedModel) -> None:
    answers = scored.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(PAIRS, answers, strict=True):
        if context:
            before, after = scored._encode_pair(context, continuation)
        else:
            before, after = [scored.eot_token_id], scored.tok_encode(continuation)
        expected = loglikelihood(demo_reference, before, after)
        assert total == pytest.approx(expected[0], abs=1e-2)
        assert greedy == expected[1]


def test_rolling_loglikelihoods_are_transformers(
    scored: SedacLM, demo_reference: PreTrainedModel
) -> None:
    text = "def main():\n    return 0\n"
    (total,) = scored.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    expected, _ = loglikelihood(demo_reference, [scored.eot_token_id], scored.tok_encode(text))
    assert total == pytest.approx(expected, abs=1e-2)


def test_texts_stand_behind_the_tokenizers_first_token(
    demo_bundle: Path, demo_reference: PreTrainedModel, tmp_path: Path
) -> None:
    """Which need not be the one that ends them."""
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle")
    config = json.loads((bundle / "tokenizer_config.json").read_text())
    config["bos_token"] = {"content": "import"}
    rewrite_file(bundle, "tokenizer_config.json", json.dumps(config).encode())
    model = SedacLM(bundle=str(bundle))
    (first,) = model.tok_encode("import")
    assert first != model.eot_token_id
    (total,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", [("def main",)]))
    (pair,) = model.loglikelihood(requests("loglikelihood", [("", "def main")]), disable_tqdm=True)
    expected, _ = loglikelihood(demo_reference, [first], model.tok_encode("def main"))
    assert total == pytest.approx(expected, abs=1e-2)
    assert pair[0] == pytest.approx(expected, abs=1e-2)


def test_texts_longer_than_the_cache_are_scored_in_windows(scored: SedacLM) -> None:
    (total,) = scored.loglikelihood_rolling(requests("loglikelihood_rolling", [("x = 1\n" * 500,)]))
    assert math.isfinite(total)
    assert total < 0


def test_texts_end_before_a_stop_string(scored: SedacLM, demo_model: SedacModel) -> None:
    prompts = ["def main():\n", "class Stack:\n"]
    settings = {"until": ["\n\n"], "max_gen_toks": 24}
    asked = [(prompt, settings) for prompt in prompts]
    texts = scored.generate_until(requests("generate_until", asked))
    for prompt, text in zip(prompts, texts, strict=True):
        whole = demo_model.generate(prompt, mode="full", max_new_tokens=24).text
        assert text == whole.partition("\n\n")[0]


def test_samples_of_one_context_differ(scored: SedacLM, demo_model: SedacModel) -> None:
    sampled = {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 1.0}
    asked = [("def main():\n", sampled)] * 3 + [("def main():\n", sampled | {"top_k": 1})]
    *texts, likeliest = scored.generate_until(requests("generate_until", asked))
    assert len(set(texts)) == len(texts)
    greedy = demo_model.generate("def main():\n", mode="full", max_new_tokens=16)
    assert likeliest == greedy.text


def test_settings_that_are_not_supported_are_named(scored: SedacLM) -> None:
    asked = [("def main():\n", {"until": [], "num_beams": 4})]
    with pytest.raises(InputError, match="num_beams"):
        scored.generate_until(requests("generate_until", asked))


def test_generations_that_leave_no_room_for_a_prompt_are_refused(scored: SedacLM) -> None:
    cache = scored._core.max_cache_length
    too_long = {"until": [], "max_gen_toks": cache}
    refused = f"max_gen_toks {cache} .* cache of {cache} positions; .* --max-cache-length"
    with pytest.raises(InputError, match=refused):
        scored.generate_until(requests("generate_until", [("def main():\n", too_long)]))


@pytest.mark.parametrize("argument", ["treshold=0.5", "kv_fill=defer", "min_layer_ratio=0.5"])
def test_model_arguments_that_are_not_known_are_named(demo_bundle: Path, argument: str) -> None:
    name = argument.partition("=")[0]
    with pytest.raises(InputError, match=f"{name} is not known; known are .*threshold, tau"):
        SedacLM.create_from_arg_string(f"bundle={demo_bundle},{argument}")


def test_what_the_harness_adds_is_accepted(demo_bundle: Path) -> None:
    arguments = {"bundle": str(demo_bundle), "trust_remote_code": True}
    added = {"batch_size": "2", "max_batch_size": 4, "device": "cpu"}
    SedacLM.create_from_arg_obj(arguments, added)


@pytest.mark.parametrize(
    ("argument", "named"),
    [("tau=high", "'tau'"), ("consecutive_k=2.5", "'consecutive_k'"), ("policy=3", "'policy'")],
)
def test_model_arguments_of_another_type_are_named(
    demo_bundle: Path, argument: str, named: str
) -> None:
    with pytest.raises(InputError, match=named):
        SedacLM.create_from_arg_string(f"bundle={demo_bundle},mode=exit,{argument}")


def test_a_bundle_is_needed() -> None:
    with pytest.raises(InputError, match="bundle is missing"):
        SedacLM.create_from_arg_string("mode=exit")


@pytest.mark.parametrize("batch_size", ["0", -3])
def test_batch_sizes_are_positive(demo_bundle: Path, batch_size: int | str) -> None:
    with pytest.raises(InputError, match=f"batch_size {batch_size} is out of range"):
        SedacLM(bundle=str(demo_bundle), batch_size=batch_size)


def test_chat_templates_are_refused(scored: SedacLM, local_task: TaskManager) -> None:
    with pytest.raises(InputError, match="leave out --apply_chat_template"):
        simple_evaluate(
            scored, tasks=["local_choice"], task_manager=local_task, apply_chat_template=True
        )


@pytest.mark.parametrize("batch_size", ["auto", "auto:4"])
def test_batch_sizes_are_numbers(demo_bundle: Path, batch_size: str) -> None:
    with pytest.raises(InputError, match=f"batch_size {batch_size} is not a number; give how many"):
        SedacLM(bundle=str(demo_bundle), batch_size=batch_size)


def test_the_command_says_what_is_refused_in_a_line(
    demo_bundle: Path,
    local_task: TaskManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["lm_eval", "run", "--model", "sedac", "--tasks", "local_choice"]
    arguments += ["--include_path", str(tmp_path), "--batch_size", "auto"]
    arguments += ["--model_args", f"bundle={demo_bundle}"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match="2"):
        lm_eval.main()
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: batch_size auto is not")


def test_exits_are_measured(scored: SedacLM, demo_bundle: Path) -> None:
    early = SedacLM(bundle=str(demo_bundle), mode="exit", tau=0.5, batch_size=2)
    asked = requests("loglikelihood", PAIRS[:3])
    full = scored.loglikelihood(asked, disable_tqdm=True)
    exited = early.loglikelihood(asked, disable_tqdm=True)
    assert [total for total, _ in full] != [total for total, _ in exited]


@pytest.fixture
def local_task(tmp_path: Path) -> TaskManager:
    """The task "local_choice"."""
    documents = [
        {"question": "import ", "choices": ["os", "qqqzzz"], "answer": 0},
        {"question": "def f(self", "choices": ["{}}{}", "):"], "answer": 1},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "task.yaml").write_text(TASK.replace("FILE", str(data)))
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def evaluate(model: Any, manager: TaskManager) -> tuple[float, list[tuple[float, bool]]]:
    """The accuracy on the task, and the answers of the model."""
    result = simple_evaluate(
        model, tasks=["local_choice"], task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
    )
    samples = result["samples"]["local_choice"]
    answers = [answer for sample in samples for answer in sample["filtered_resps"]]
    return result["results"]["local_choice"]["acc,none"], answers


def test_a_task_of_local_files(scored: SedacLM, local_task: TaskManager) -> None:
    assert evaluate(scored, local_task)[0] == 1.0


@pytest.mark.parametrize("tokenized", [False, True])
def test_local_completions_measure_the_same(
    scored: SedacLM, local_task: TaskManager, demo_bundle: Path, tokenized: bool
) -> None:
    with serving(demo_bundle, "--threads", 1) as server:
        client = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model=demo_bundle.name,
            tokenizer=str(DEMO_MODEL),
            tokenizer_backend="huggingface",
            tokenized_requests=tokenized,
            max_length=scored._core.max_cache_length,
            max_retries=1,
        )
        accuracy, answers = evaluate(client, local_task)
        pairs = client.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert accuracy == 1.0
    expected = evaluate(scored, local_task)[1]
    expected += scored.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (total, greedy), (ours, is_greedy) in zip(expected, [*answers, *pairs], strict=True):
        assert ours == pytest.approx(total, abs=1e-3)
        assert is_greedy == greedy
