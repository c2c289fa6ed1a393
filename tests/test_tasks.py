"""Tasks of lm-evaluation-harness: its own answers are ours, and every answer stands beside the original's."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate as evaluate_by_the_harness
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

import bitladder
from bitladder.errors import DataError, RecipeError
from bitladder.evaluation.harness import questions
from bitladder.evaluation.harness.models import Elsewhere, Loaded
from bitladder.evaluation.harness.tasks import Tasks
from bitladder.evaluation.reading import cached, load_checkpoint
from bitladder.models.loading import load_model
from bitladder.recipe import parse_recipe
from bitladder.recipe.sections import TaskName
from bitladder.records import Evaluation, Paired, ProbeResult
from bitladder.runinfo import no_progress
from bitladder.runtimes import child
from bitladder.runtimes.vllm.served import Probes, Scores, Served
from bitladder.steps import asking
from bitladder.steps import probe as probe_step
from bitladder.steps.evaluate import evaluate
from bitladder.steps.known import probe_path, probed
from bitladder.steps.look import look
from bitladder.steps.preflight import preflight
from bitladder.steps.preview import preview
from bitladder.steps.run import run
from bitladder.steps.workspace import Workspace
from conftest import llama_config, put_first, save_model
from test_report_runtimes import make_probe

NAMES = TaskName.__args__
FOLDER = Path(questions.__file__).parent
SAMPLES = 12


def asked(directory, names=NAMES, samples=SAMPLES):
    return Tasks(names, samples, AutoTokenizer.from_pretrained(directory))


# --- questions ---


@pytest.mark.parametrize("name", NAMES)
def test_questions_can_be_answered_and_no_place_is_right_more_often(name):
    found = [json.loads(line) for line in questions.lines_of(name, 10**6)]
    offered = {"novel_endings": 4, "novel_words": 10}[name]
    assert len(found) == len({one["context"] for one in found}) == 500
    assert all(len(set(one["choices"])) == len(one["choices"]) == offered for one in found)
    words = {len(choice.split()) for one in found for choice in one["choices"]}
    assert len(words) == 1, "no answer is told by its length"
    places = [one["answer"] for one in found]
    assert set(places) == set(range(offered))
    assert scipy.stats.chisquare(np.bincount(places)).pvalue > 0.01


def test_questions_are_none_that_a_recipe_of_ours_calibrates_on():
    root = Path(__file__).parents[1] / "recipes" / "data"
    texts = " ".join(" ".join(path.read_text().split()) for path in root.glob("*.txt"))
    contexts = [json.loads(line)["context"] for name in NAMES for line in questions.lines_of(name, 500)]
    assert len(texts) > 300_000
    assert not [context for context in contexts if context[-40:] in texts]


def test_fewer_questions_are_the_first_ones():
    assert questions.lines_of("novel_words", 3) == questions.lines_of("novel_words", 500)[:3]
    assert questions.fingerprint("novel_words", 3) != questions.fingerprint("novel_words", 4)


# --- answers ---


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """Two Llamas that are sure of what they say, with words for tokens: others like the shortest answer best."""
    texts = [line for name in NAMES for line in questions.lines_of(name, 500)]
    config = llama_config(initializer_range=1.0, tie_word_embeddings=False, vocab_size=4096)
    places = [tmp_path_factory.mktemp(f"sharp{seed}") for seed in (0, 1)]
    for seed, place in enumerate(places):
        save_model(transformers.LlamaForCausalLM, config, place, seed)
        AutoTokenizer.from_pretrained(place).train_new_from_iterator(texts, 4096).save_pretrained(place)
    return places


@pytest.fixture(scope="module")
def tasked(sharp):
    return asked(sharp[0])


def test_answers_are_those_of_the_harness_on_a_model_that_it_loads_itself(sharp, tasked):
    """Its own loader, its own batches of one, its own loop over questions."""
    by_itself = HFLM(str(sharp[0]), device="cpu", dtype="float32", batch_size=1)
    known = TaskManager(include_path=str(FOLDER), include_defaults=False).load(list(NAMES))
    theirs = evaluate_by_the_harness(by_itself, known, limit=SAMPLES, bootstrap_iters=0)
    model = bitladder.load(sharp[0])
    ours, loaded = tasked.answers(model, no_progress, "tasks"), Loaded(model, tasked.tokenizer, lambda _: None)
    elsewhere = Elsewhere(tasked.tokenizer, lambda rows: [row_log_probs(model, row) for row in rows])
    for name in NAMES:
        assert ours[name] == "".join(f"{sample['acc']:.0f}" for sample in theirs["samples"][name])
        assert ours[name].count("1") / SAMPLES == theirs["results"][name]["acc,none"]
        requests = [
            Instance("loglikelihood", {}, arguments, 0)
            for sample in theirs["samples"][name]
            for arguments in sample["arguments"]
        ]
        expected = [one[0] for sample in theirs["samples"][name] for one in sample["filtered_resps"]]
        for one in (loaded, elsewhere):
            found = one.loglikelihood(requests, disable_tqdm=True)
            assert [value for value, _ in found] == pytest.approx(expected, rel=1e-4)
    assert ours != tasked.answers(bitladder.load(sharp[1]), no_progress, "tasks"), "answers are the model's"


def test_bf16_logits_are_compared_in_float32(sharp, tasked):
    """Log-probabilities in BF16 have steps of 0.06 at 10 nats: choices would tie."""
    model = load_model(sharp[0], torch.bfloat16)
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = Loaded(model, tasked.tokenizer, lambda _: None)._model_call(ids)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, model(input_ids=ids).logits.float())


def test_a_checkpoint_is_asked_through_the_kv_cache_that_it_asks_for(good):
    model = load_checkpoint(good["kv_full"])
    tokenizer = AutoTokenizer.from_pretrained(good["kv_full"])
    ids = torch.arange(20, 60)[None]
    ours = Loaded(model, tokenizer, lambda _: None)._model_call(ids)
    with torch.no_grad():
        assert torch.equal(ours, model(input_ids=ids, **cached(model)).logits)
        assert not torch.equal(ours, model(input_ids=ids, use_cache=False).logits)


def row_log_probs(model, row):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row])).logits[0, :-1].float().log_softmax(-1)
    return tuple(logits.gather(-1, torch.tensor(row[1:])[:, None])[:, 0].tolist())


def test_answers_from_scored_rows_are_those_of_the_loaded_model(sharp, tasked):
    model = bitladder.load(sharp[0])
    log_probs = {row: row_log_probs(model, row) for row in tasked.rows()}
    assert tasked.answers_from(log_probs) == tasked.answers(model, no_progress, "tasks")
    worst = {row: [-value for value in values] for row, values in log_probs.items()}
    assert tasked.answers_from(worst) != tasked.answers_from(log_probs)


def test_rows_begin_as_a_server_begins_them(tmp_path, tasked):
    directory = save_model(transformers.LlamaForCausalLM, llama_config(), tmp_path / "bos")
    put_first(directory)
    with_bos = asked(directory, samples=2)
    bos = with_bos.tokenizer.bos_token_id
    assert all(row[0] == bos and bos not in row[1:] for row in with_bos.rows())
    assert len(with_bos.rows()) == 2 * (4 + 10)
    (question,) = (json.loads(line) for line in questions.lines_of("novel_endings", 1))
    whole = {tasked.tokenizer.decode(row) for row in replace(tasked, names=("novel_endings",), samples=1).rows()}
    assert whole == {f"{question['context']} {choice}" for choice in question["choices"]}


def test_a_model_that_is_too_short_for_a_question_is_refused(tasked):
    tasked.check_length(None)
    longest = max(map(len, tasked.rows()))
    tasked.check_length(longest)
    with pytest.raises(DataError, match=f"{longest} tokens, more than the {longest - 1} positions"):
        tasked.check_length(longest - 1)


# --- pairs ---


def paired(lost, gained, both=10, neither=5):
    return Paired(
        right="0" * lost + "1" * gained + "1" * both + "0" * neither,
        reference="1" * lost + "0" * gained + "1" * both + "0" * neither,
    )


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (3, 1), (1, 9), (12, 12), (40, 7)])
def test_a_p_value_is_the_exact_binomial_tests(lost, gained):
    found = paired(lost, gained)
    assert (found.lost, found.gained) == (lost, gained)
    assert found.difference == pytest.approx(found.accuracy - found.original)
    expected = scipy.stats.binomtest(gained, lost + gained).pvalue if lost + gained else 1.0
    assert found.p_value == pytest.approx(expected)


@pytest.mark.parametrize("lost", [0.01, 0.05])
@pytest.mark.parametrize("gained", [0.01, 0.03])
def test_an_interval_holds_the_difference_as_often_as_it_says(lost, gained):
    draws = np.random.default_rng(0).multinomial(300, [lost, gained, 0.6, 0.4 - lost - gained], size=2000)
    intervals = [paired(*row).interval for row in draws.tolist()]
    held = np.mean([low <= gained - lost <= high for low, high in intervals])
    assert 0.93 <= held <= 0.995
    assert all(-1 <= low < high <= 1 for low, high in intervals)


def test_pairs_of_different_questions_are_refused():
    with pytest.raises(ValueError, match="two numbers of questions"):
        Paired(right="01", reference="011")


# --- steps ---


@pytest.fixture
def recipe(llama, text_file, tmp_path):
    def of(**changes):
        data = {"samples": 4, "sequence_length": 24, "batch_size": 2}
        content = {
            "model": {"path": str(llama)},
            "calibration": {"data": {"kind": "text", "path": str(text_file)}, **data},
            "held_out": {"data": {"kind": "text", "path": str(text_file)}, **data},
            "schemes": [{"name": "full", "coverage": 1.0}, {"name": "half", "coverage": 0.5}],
            "controls": {"kinds": ["inverse"]},
            "output": str(tmp_path / "out"),
        }
        return parse_recipe({**content, **changes}, "recipe")

    return of


def work_of(recipe):
    return Workspace(recipe, Path(recipe.output))


def test_a_run_asks_the_tasks_once_and_reports_them(recipe, llama):
    run(work_of(recipe()))
    before = Evaluation.read(Path(recipe().output) / "evaluations" / "full.json")
    with_tasks = recipe(tasks={"names": list(NAMES), "samples": SAMPLES})
    work = work_of(with_tasks)
    report = run(work)
    assert work.done == ["evaluate"], "neither checkpoints nor control arms are made again"
    evaluation = Evaluation.read(work.evaluation_file("full"))
    assert evaluation.results[: len(before.results)] == before.results
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for name in NAMES:
        one = Tasks((name,), SAMPLES, tokenizer)
        result = evaluation.result("task_accuracy", name)
        right = one.answers(bitladder.load(work.checkpoint_directory("full")), no_progress, "tasks")[name]
        assert result.paired == Paired(right=right, reference=one.answers(bitladder.load(llama), no_progress, "")[name])
        assert result.value == right.count("1") / SAMPLES
        assert evaluation.tasks[name].sha256 == questions.fingerprint(name, SAMPLES)
        assert evaluation.tasks[name].harness.startswith("lm-eval 0.4.")
    text = (work.output / "report.md").read_text()
    line, _ = re.findall(r"^\| full \| novel_words \| evaluation \|.*$", text, re.M)
    accuracy, original, _, asked = [cell.strip() for cell in line.split("|")[4:-1]]
    assert (accuracy, asked) == (f"{100 * result.value:.1f}% ± {100 * result.standard_error:.1f}%", str(SAMPLES))
    assert original == f"{100 * result.reference:.1f}%"
    assert "worst task, points beside the original" in text
    assert report.splits == ("held_out",)
    again = work_of(with_tasks)
    run(again)
    assert again.done == []
    fewer = work_of(recipe(tasks={"names": ["novel_words"], "samples": SAMPLES - 1}))
    evaluate(fewer)
    assert fewer.done == ["evaluate"]


def test_a_dry_run_sees_that_vllm_has_not_answered_the_tasks_and_removes_nothing(recipe, monkeypatch):
    monkeypatch.setattr(child, "installed_version", lambda python: "0.32.0")
    run(work_of(recipe()))
    work = work_of(recipe(runtimes={"vllm": {"python": sys.executable, "stage": "generate"}}))
    for manifest in work.manifests().values():
        one = make_probe(manifest, "generate")
        one.write(probe_path(work, one))
    earlier = make_probe(manifest, "load", manifest_sha256="0" * 64)
    earlier.write(probe_path(work, earlier))

    def why(**changes):
        found = {ahead.step: ahead.why for ahead in preview(work_of(recipe(**changes)))}
        return found["probe"]

    vllm = work.recipe.runtimes.model_dump()
    assert why(runtimes=vllm) is None
    asked = {"names": ["novel_words"], "samples": SAMPLES}
    assert why(runtimes=vllm, tasks=asked) == "vLLM 0.32.0 wasn't asked about full, half"
    assert probe_path(work, earlier).exists()
    preflight(work)
    assert not probe_path(work, earlier).exists()
    assert len(probed(work, work.manifests())) > len(work.manifests())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_probe_says_that_it_is_of_one_device_where_several_will_serve(ranks, recipe, monkeypatch):
    monkeypatch.setattr(child, "installed_version", lambda python: "0.32.0")
    lines = []
    content = recipe(tensor_parallel=ranks, runtimes={"vllm": {"python": sys.executable}}, controls={"kinds": []})
    work = Workspace(content, Path(content.output), tell=lines.append)
    monkeypatch.setattr(
        probe_step.load, "probe", lambda directory, *_, **__: make_probe(work.manifests()[directory.name], "load")
    )
    run(work)
    told = [line for line in lines if "on one device, not on the 2 of tensor_parallel; pre-flight says" in line]
    assert len(told) == ranks - 1
    lines.clear()
    run(work)
    assert not lines  # nothing was probed


@pytest.mark.parametrize("missing", ["lm_eval", "accelerate"])
def test_without_the_extra_one_line_comes_before_anything_is_done(recipe, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with_tasks = recipe(tasks={"names": ["novel_words"]})
    words = rf"^tasks\.names asks .* {missing} can't be imported; pip install 'bitladder\[tasks\]', or leave tasks out$"
    with pytest.raises(RecipeError, match=words):
        run(work_of(with_tasks))
    assert not Path(with_tasks.output).exists()
    with pytest.raises(RecipeError, match=words):
        look(work_of(with_tasks), held_out=True)
    look(work_of(with_tasks))  # measuring alone asks nothing
    look(work_of(recipe()), held_out=True)


def result_of(directory, **fields):
    words = {"checkpoint": directory.name, "scheme": "full", "manifest_sha256": "0", "runtime": "vllm"}
    return ProbeResult(**words, version="1", stage="generate", reached="asked", device="cpu", **fields)


def test_a_runtimes_answers_stand_beside_those_of_the_original_in_it(sharp, tasked, monkeypatch):
    """What vLLM says of rows is in test_probe_serve.py; here the rows are scored by two models of ours."""
    llama, other = sharp
    served = {
        directory: Served(
            rows=tuple(Scores(token_ids=row, log_probs=row_log_probs(model, row)) for row in tasked.rows()),
        )
        for directory, model in ((one, bitladder.load(one)) for one in (llama, other))
    }
    asked_for = []

    def serve_all(directories, python, job, **_):
        asked_for.append(job)
        return Probes(source=None, results=tuple(map(result_of, directories)), served=served)

    monkeypatch.setattr(asking, "serve_all", serve_all)
    options = {"device": "cpu", "timeout": 1.0}
    (result,) = asking.serve_samples({}, [other], llama, Path("python"), tasks=tasked, **options)
    assert asked_for[0].rows == tasked.rows()
    assert asked_for[0].requests == len(tasked.rows())
    assert asked_for[0].tokens_in_context == max(map(len, tasked.rows())) + 1
    right, reference = (tasked.answers(bitladder.load(one), no_progress, "") for one in (other, llama))
    assert right != reference
    assert {one.task: one.answers for one in result.tasks} == {
        name: Paired(right=right[name], reference=reference[name]) for name in NAMES
    }
    assert probe_step._answers(result, tasked)
    assert not probe_step._answers(result, replace(tasked, samples=SAMPLES + 1)), "other questions"
    assert not probe_step._answers(result_of(llama), tasked)
    assert probe_step._answers(result_of(llama), None)
    served[other] = Served(returncode=-9)
    (killed,) = asking.serve_samples({}, [other], llama, Path("python"), tasks=tasked, **options)
    assert killed.tasks == ()
    (unasked,) = asking.serve_samples({}, [other], llama, Path("python"), **options)
    assert (unasked.tasks, asked_for[-1].rows) == ((), ())


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"names": ["hellaswag"]}, "'novel_endings' or 'novel_words'"),
        ({"names": ["novel_words", "novel_words"]}, "given twice"),
        ({"names": ["novel_words"], "samples": 501}, "less than or equal to 500"),
    ],
)
def test_tasks_that_are_not_there_are_refused(recipe, section, words):
    with pytest.raises(RecipeError, match=words):
        recipe(tasks=section)


def test_a_held_out_set_cannot_be_taken_for_a_task(recipe, text_file):
    held_out = {"name": "novel_words", "data": {"kind": "text", "path": str(text_file)}}
    with pytest.raises(RecipeError, match="has the name of the task novel_words"):
        recipe(tasks={"names": ["novel_words"]}, held_out=held_out)


def test_the_harness_is_imported_only_where_tasks_are_asked():
    code = (
        "import sys, bitladder, bitladder.steps.run, bitladder.steps.asking, bitladder.evaluation.harness.tasks\n"
        "print('lm_eval' in sys.modules)\n"
        "import bitladder.evaluation.harness.models\n"
        "print('lm_eval' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "True"]
