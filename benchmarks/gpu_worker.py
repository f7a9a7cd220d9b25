"""One stage of `gpu_campaign.py`, in a process that a kernel may kill."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from gpu_campaign import FAILED, LATE, POISONED, ROOT
from gpu_shapes import Call, UibShape, blocks, calls, compiles_as, launches, uib_arguments
from gpu_steps import steps, training_kernels
from gpu_training import training_calls
from gpu_work import Rows, Work, model_of, signature, timed

from mnv4_kernels.ops._contract import REFERENCES
from mnv4_kernels.ops.gpu import gate, tune
from mnv4_kernels.ops.gpu.config import Config
from mnv4_kernels.ops.gpu.traffic import Ceilings
from mnv4_kernels.ops.support import dtype_name

#: error of a kernel relative to the largest value, against float32 or float64 sums
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-8}

#: smaller models whose calls are checked in every dtype
SMALL = ("conv_small_035", "hybrid_medium_075")


def ceilings(work: Work) -> Rows:
    """Copies through memory and within L2, a matrix product, a launch inside a graph."""
    gpu = work.gpu
    size = 2**22 if work.arguments.dry_run else 2**30

    def copy() -> dict[str, Any]:
        source = torch.empty(size, dtype=torch.int8, device=gpu.device)
        target = torch.empty_like(source)
        timing = gpu.time(lambda: target.copy_(source))
        return {**timing, "gb_s": round(2 * size / timing["median_us"] / 1e3, 1)}

    def within_l2() -> dict[str, Any]:
        part = size // 128
        source, target = (torch.empty(part, dtype=torch.int8, device=gpu.device) for _ in range(2))
        us = gpu.together(lambda: target.copy_(source), 200)
        return {"us": round(us, 2), "gb_s": round(2 * part / us / 1e3, 1)}

    def product() -> dict[str, Any]:
        side = 64 if work.arguments.dry_run else 8192
        a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=gpu.device) for _ in range(2))
        timing = gpu.time(lambda: a @ b)
        # not rounded: without a device it is next to nothing, and no tuned file takes a zero
        return {**timing, "tflop_s": 2 * side**3 / timing["median_us"] / 1e6}

    def launch() -> dict[str, Any]:
        x = torch.zeros(1, device=gpu.device)
        run = gpu.replay(lambda: [x.add_(1) for _ in range(100)])
        return {"us": round(gpu.together(run, 20) / 100, 3)}

    def device() -> dict[str, Any]:
        import timm
        import triton

        versions = {"torch": torch.__version__, "triton": triton.__version__, "timm": timm.__version__}
        return {"name": gpu.name, "capability": gpu.capability, "multiprocessors": gpu.multiprocessors, **versions}

    yield "device", device
    yield "copy", copy
    yield "copy within L2", within_l2
    yield "matrix product", product
    yield "launch", launch


def compiled(
    case: tuple[str, int, str, int | None], train: bool, capability: int, processors: int, most: int | None = None
) -> tuple[int, list[str]]:
    """Compiles the binaries of a case, `most` of them, into Triton's cache on disk; (how many, what failed)."""
    from mnv4_kernels.ops.gpu.offline import compile_launch
    from mnv4_kernels.ops.gpu.select import assume

    model, batch, dtype, size = case
    seen, failures = set(), []
    with assume(capability, processors):
        for block in blocks(model, batch, size):
            for call in (training_calls if train else calls)(block, getattr(torch, dtype), "meta"):
                for launch in launches(call):
                    if compiles_as(launch) in seen or len(seen) == most:
                        continue
                    seen.add(compiles_as(launch))
                    try:
                        compile_launch(launch, capability)
                    # one kernel that does not compile must not cost the others
                    except Exception as error:
                        failures.append(f"{launch.kernel.__name__} {launch.config}: {error}")
    return len(seen), failures


def precompile(work: Work) -> Rows:
    """Triton's compiler in all processors: what later stages launch lies in its cache."""
    cases = [(model, batch, dtype_name(dtype), work.arguments.size) for model, batch, dtype in work.cases()]
    cases += [(model, 17, dtype, 128) for dtype in ("float16", "float32", "bfloat16") for model in SMALL]
    yield from _compiling(work, "precompile", cases, train=False)


def precompile_training(work: Work) -> Rows:
    """The same for the stages that train."""
    cases = [(model, batch, dtype_name(dtype), work.arguments.size) for model, batch, dtype in work.cases()]
    yield from _compiling(work, "precompile_training", cases, train=True)


def _compiling(work: Work, stage: str, cases: list[tuple[str, int, str, int | None]], train: bool) -> Rows:
    import triton

    most, workers = None, os.cpu_count()
    if work.arguments.dry_run:
        cases, most, workers = cases[:1], 1, 1
    # a machine that was given back took its cache along: what an earlier call compiled is then not here
    mark = Path(triton.knobs.cache.dir) / f"{stage} for {work.gpu.name}"
    if not mark.exists():
        work.results.rows(stage).clear()

    def all_of_them() -> dict[str, Any]:
        found, failures = 0, []
        # not forked: children of a process that has used CUDA can't
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            target = (train, work.gpu.capability, work.gpu.multiprocessors, most)
            waiting = [pool.submit(compiled, case, *target) for case in cases]
            for future in waiting:
                count, failed = future.result()
                found, failures = found + count, failures + failed
                # the supervisor takes a file that changes for a worker that lives
                work.results.save()
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        if failures:
            raise RuntimeError(f"{len(failures)} of {found} binaries do not compile:\n" + "\n".join(failures[:20]))
        return {"binaries": found}

    yield "heuristic configs", all_of_them


def disagreement(call: Call, result: Any, wide: torch.dtype) -> float:
    """The largest error of `result` against the reference in `wide`, relative to the largest value."""
    flags: Any = torch.backends.cudnn
    before, flags.conv.fp32_precision = flags.conv.fp32_precision, "ieee"
    try:
        values = [v.to(wide) if torch.is_tensor(v) and v.is_floating_point() else v for v in call.arguments]
        expected = REFERENCES[call.op](*values)
    finally:
        flags.conv.fp32_precision = before
    pairs = list(zip(result, expected, strict=True)) if isinstance(result, tuple) else [(result, expected)]
    errors = [(found.to(wide) - wanted).abs().max() / (wanted.abs().max() + 1e-12) for found, wanted in pairs]
    # NaN is no small error
    return max(float(error) if bool(torch.isfinite(error)) else float("inf") for error in errors)


def checked(work: Work, call: Call, dtype: torch.dtype, wide: torch.dtype) -> dict[str, Any]:
    """The row of a call's error; raises where it is too large."""
    result, _, configs = work.gpu.call(call.op, call.arguments)
    error = disagreement(call, result, wide)
    work.gpu.free()
    if error > TOLERANCE[dtype]:
        raise AssertionError(f"{call.role}: relative error {error:.3g} with {configs}")
    return {"role": call.role, "relative_error": error}


def correctness(work: Work) -> Rows:
    """Small models in every dtype against float64, then every call of the cases against float32."""
    size = work.arguments.size or 128
    for model in SMALL:
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            for block in blocks(model, 2 if work.arguments.dry_run else 17, size):
                for call in calls(block, dtype, work.gpu.device):
                    key = f"{call.op}/{dtype_name(dtype)}/{signature(call)}"
                    yield key, lambda call=call, dtype=dtype: checked(work, call, dtype, torch.float64)
    for key, call, dtype in work.calls():
        yield key, lambda call=call, dtype=dtype: checked(work, call, dtype, torch.float32)


def depthwise(work: Work) -> Rows:
    """Every depthwise shape: the share of the copy's bandwidth that it reaches."""
    for key, call, _ in work.calls():
        if call.op == "dwconv_bn_act":
            yield key, lambda call=call: timed(work, call, eager=False)


def kernels(work: Work) -> Rows:
    """Every call of the cases, beside the reference in torch (cuDNN)."""
    for key, call, _ in work.calls():
        yield key, lambda call=call: timed(work, call, eager=True)


def plans(work: Work) -> Rows:
    """The gate against the clock: every plan of each distinct block, predicted and measured."""
    from mnv4_kernels.ops.uib.triton_uib import build

    def row(shape: UibShape, act: str, dtype: torch.dtype) -> dict[str, Any]:
        arguments = uib_arguments(shape, act, dtype, work.gpu.device)
        found = {}
        for plan in gate.uib_plans(shape, dtype.itemsize):
            made = build(*arguments, plan=plan)[1]
            run = (lambda: None) if work.arguments.dry_run else (lambda made=made: [launch.run() for launch in made])
            timing = work.gpu.time(work.gpu.replay(run), 20)
            found[plan.name] = {**timing, "predicted_us": round(plan.us, 1), "launches": plan.launches}
        work.gpu.free()
        return {"chosen": gate.uib(shape, dtype.itemsize).plan.name, "plans": found}

    for model, batch, dtype in work.cases():
        for block in blocks(model, batch, work.arguments.size):
            if isinstance(block.shape, UibShape):
                key = f"{dtype_name(dtype)}/{json.dumps(asdict(block.shape))}"
                yield key, lambda shape=block.shape, act=block.act, dtype=dtype: row(shape, act, dtype)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the error over the norm of the result."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def ours(work: Work) -> Rows:
    """Whole models: `optimize`, with and without the copies in and out, and its error beside eager's."""

    def row(name: str, batch: int, dtype: torch.dtype) -> dict[str, Any]:
        net, x = model_of(work, name, batch, dtype)
        few = x[: min(batch, 16)]
        exact, eager = net.double()(few.double()), net.to(dtype)(few)
        net, _ = model_of(work, name, 1, dtype)
        fast = work.gpu.optimize(net, dtype)
        found: dict[str, Any] = work.gpu.time(lambda: fast(x))
        found["relative_error"] = relative(fast(few), exact)
        found["eager_relative_error"] = relative(eager, exact)
        # the first kind of input that it met: x's
        found["replay"] = work.gpu.time(next(iter(fast._graphs._recordings.values())).replay)
        found["images_s"] = round(batch / found["median_us"] * 1e6)
        work.gpu.free()
        if not found["relative_error"] <= 3 * found["eager_relative_error"] + 1e-3:
            raise AssertionError(
                f"error {found['relative_error']:.3g}, eager's {found['eager_relative_error']:.3g}: {found}"
            )
        return found

    for name, batch, dtype in work.cases():
        yield f"{name}/b{batch}/{dtype_name(dtype)}", lambda n=name, b=batch, d=dtype: row(n, b, d)


def baseline(work: Work) -> Rows:
    """Whole models as others run them: eager in channels_last, `torch.compile`, and that with `enable_gqa`."""

    def eager(name: str, batch: int, dtype: torch.dtype) -> dict[str, Any]:
        net, x = model_of(work, name, batch, dtype)
        net = net.to(dtype)
        return work.gpu.time(lambda: net(x), 20)

    def compiled(name: str, batch: int, dtype: torch.dtype, grouped: bool) -> dict[str, Any]:
        net, x = model_of(work, name, batch, dtype)
        torch._dynamo.reset()
        functional: Any = torch.nn.functional
        stock = functional.scaled_dot_product_attention

        def attend(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
            return stock(query, key, value, *rest, **options, enable_gqa=True)

        begin = time.monotonic()
        functional.scaled_dot_product_attention = attend if grouped else stock
        try:
            run = work.gpu.compile(net.to(dtype))
            run(x)
            seconds = time.monotonic() - begin
            # inside: compiled code guards on the function and would be compiled again without it
            timing = work.gpu.time(lambda: run(x))
        finally:
            functional.scaled_dot_product_attention = stock
        return {**timing, "compile_seconds": round(seconds, 1)}

    for name, batch, dtype in work.cases():
        key = f"{name}/b{batch}/{dtype_name(dtype)}"
        yield f"{key}/channels_last", lambda n=name, b=batch, d=dtype: eager(n, b, d)
        grouped = name.startswith("hybrid")
        label = f"max-autotune{', enable_gqa' if grouped else ''}"
        yield f"{key}/{label}", lambda n=name, b=batch, d=dtype, g=grouped: compiled(n, b, d, g)


def _command(command: list[str], seconds: float, **extra: str) -> dict[str, Any]:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env={**os.environ, **extra}, check=False
        )
    except subprocess.TimeoutExpired as cut:
        text = cut.stdout.decode() if isinstance(cut.stdout, bytes) else cut.stdout or ""
        return {"status": "out of time", "tail": text[-6000:]}
    row = {"status": done.returncode, "tail": (done.stdout + done.stderr)[-6000:]}
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}\n{row['tail']}")
    return row


def _python(work: Work, *arguments: str) -> list[str]:
    """A command of this Python; in a dry run pytest collects and runs nothing."""
    return [sys.executable, *arguments, *(["--collect-only"] if work.arguments.dry_run else [])]


PYTEST = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider")


#: what holds the tests marked `gpu`
GPU_TESTS = ("test_triton_gpu.py", "test_gpu_models.py", "test_triton_gpu_training.py")


def tests(work: Work) -> Rows:
    """The tests marked `gpu`, file by file; those that compile most come last."""
    files = [ROOT / "tests" / name for name in GPU_TESTS]
    for path in files:
        command = _python(work, *PYTEST, str(path), "-k", "not every_config")
        yield path.stem, lambda c=command: _command(c, work.deadline - time.monotonic())
    command = _python(work, *PYTEST, str(files[0]), "-k", "every_config")
    yield "every config", lambda: _command(command, work.deadline - time.monotonic())


def sanitizer(work: Work) -> Rows:
    """compute-sanitizer over one small call of each kernel."""
    found = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")
    test = _python(work, *PYTEST, "-k", "small_call and bfloat16", str(ROOT / "tests" / "test_triton_gpu.py"))

    def row(tool: str) -> dict[str, Any]:
        command = test if work.arguments.dry_run else [str(found), "--tool", tool, "--error-exitcode", "9", *test]
        if found is None and not work.arguments.dry_run:
            return {"status": "compute-sanitizer is not installed"}
        # the allocator's blocks would hide what reads past a tensor
        return _command(command, work.deadline - time.monotonic(), PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    for tool in ("memcheck", "racecheck"):
        yield tool, lambda tool=tool: row(tool)


def sweep(work: Work) -> Rows:
    """Launch configs: the neighbours of each choice, calls with the longest way to the copy's rate first."""
    measured = work.results.rows("kernels") | work.results.rows("depthwise")

    def lost(key: str) -> float:
        row = measured.get(key, {})
        return float(row.get("median_us", 0.0)) * (1.0 - min(1.0, float(row.get("of_copy", 0.0))))

    def row(call: Call) -> dict[str, Any]:
        first = work.gpu.call(call.op, call.arguments)
        found = {}
        for key, config in first[2].items():
            found[key] = descend(work, call, key, config, first[0])
        work.gpu.free()
        return {"configs": found}

    every = {key: call for key, call, _ in work.calls()}
    for key in sorted(every, key=lost, reverse=True):
        yield key, lambda call=every[key]: row(call)


def descend(work: Work, call: Call, key: str, config: Config, expected: Any) -> dict[str, Any]:
    """From a config to its fastest neighbour, as long as there is one; noted in the tuned file."""
    times: dict[Config, float] = {}
    failures: list[str] = []

    def us(candidate: Config) -> float:
        if candidate not in times:
            times[candidate] = float("inf")
            try:
                result, run, _ = work.gpu.call(call.op, call.arguments, {key: candidate})
                if not tune.agrees(result, expected):
                    raise AssertionError("another result than the heuristic's")
                times[candidate] = work.gpu.time(work.gpu.replay(run), 20)["median_us"]
            # a tile that needs more than the device has, or is wrong: not this one
            except Exception as error:
                if not work.gpu.alive():
                    raise
                failures.append(f"{candidate}: {error}")
        return times[candidate]

    best, begin = config, us(config)
    while not work.late():
        better = min(tune.neighbours(best), key=us)
        # a few per cent are noise
        if us(better) >= 0.98 * us(best):
            break
        best = better
    tune.note(work.arguments.out / "tuned.json", key, best, us(best), provenance(work))
    return {"from": str(config), "us": begin, "to": str(best), "best_us": us(best), "failures": failures}


def provenance(work: Work) -> dict[str, Any]:
    """What a tuned file must say of itself."""
    import triton

    last = work.results.data["calls"][-1] if work.results.data.get("calls") else {}
    product = work.results.rows("ceilings").get("matrix product", {})
    return {
        "device": work.gpu.name,
        "command": last.get("command", " ".join(sys.argv)),
        "commit": last.get("commit", "unknown"),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_gb_s": work.copy_gb_s(),
        "matmul_tflop_s": product.get("tflop_s", Ceilings().matmul_tflop_s),
    }


STAGES: dict[str, Callable[[Work], Rows]] = {
    stage.__name__: stage
    for stage in (
        ceilings, precompile, correctness, depthwise, ours, baseline, kernels, plans, precompile_training,
        training_kernels, steps, tests, sanitizer, sweep,
    )
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Makes the rows of a stage that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="what `time.monotonic` may say at most")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--batches", nargs="+", type=int, required=True)
    parser.add_argument("--dtypes", nargs="+", required=True)
    parser.add_argument("--size", type=int)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--dry-run", action="store_true")
    work = Work(parser.parse_args(arguments))
    rows, name, failed = work.results.rows(work.arguments.stage), work.arguments.stage, 0
    made = 0
    with torch.no_grad():
        for key, make in STAGES[name](work):
            if key in rows:
                continue
            if work.late():
                return LATE
            if made == work.arguments.rows:
                break
            made += 1
            work.results.begin(name, key)
            try:
                row = make()
            # one broken row must not cost the others
            except Exception:
                failed, row = FAILED, {"error": traceback.format_exc()[-4000:]}
            work.results.end(name, key, row)
            if "error" in row and not work.gpu.alive():
                return POISONED
    return failed


if __name__ == "__main__":
    sys.exit(main())
