#!/bin/sh
# What does rgc do on a GPU? Calibration, proof and latency, with the results in a folder: sh benchmarks/gpu.sh FOLDER
#
# From the root of the repository, with the Python that has rgc (PYTHON=.venv/bin/python). It may be run again: rows of
# latency that are in the folder already are not measured again.
set -eu
results=${1:?usage: sh benchmarks/gpu.sh FOLDER}
python=${PYTHON:-python}
mkdir -p "$results"
$python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("this PyTorch sees no GPU")'
$python -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())' | tee "$results/machine.txt"

for dtype in float32 float16 bfloat16; do
    $python -m rgc calibrate --target cuda --dtype $dtype
done

# compiled on the GPU, and proved there in the deployed dtype; in float64 on the CPU
$python - <<'PYTHON' | tee "$results/proof.txt"
import torch

import rgc
from benchmarks.latency import MODELS
from rgc.testing import randomize

for name, entry in MODELS.items():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        model, x = randomize(entry.build()).to("cuda", dtype), torch.randn(2, *entry.sample).to("cuda", dtype)
        try:
            compiled = rgc.compile(model, x, passes=entry.passes, target="cuda")
        except rgc.RgcError as error:
            print(f"{name}, {dtype}: FAILED: {error}", flush=True)
            continue
        assert {p.device.type for p in compiled.parameters()} <= {"cuda"}, "a layer was left on the CPU"
        found = compiled.report.verification
        print(f"{name}, {dtype}: equal {found.equal}, deployed {found.deployed_error:.1e} of {found.allowed_error:.1e}, "
              f"undone {len(compiled.report.failures)}", flush=True)
PYTHON

for dtype in float32 float16; do
    for batch in 1 64; do
        $python -m benchmarks.latency --device cuda --dtype $dtype --batch $batch --seconds 3 \
            --runtimes eager,torch.compile --store "$results/latency.jsonl" >/dev/null
        $python -m benchmarks.latency --device cuda --dtype $dtype --batch $batch --seconds 3 --cuda-graphs \
            --runtimes eager --store "$results/latency.jsonl" >/dev/null
    done
done
$python -m benchmarks.latency --print --store "$results/latency.jsonl" | tee "$results/latency.md"
