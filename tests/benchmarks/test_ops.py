"""The gate of the cases of single ops: a wrong result of anyone turns it red, and nobody else's line."""

from __future__ import annotations

import pytest
import torch

from benchmarks.case import Context, Skip
from benchmarks.run import load_case

#: Cases whose workloads are :class:`benchmarks.cases._ops.Op`'s.
CASES = ("activation", "experts", "merge", "norm", "rope")


@pytest.mark.parametrize("name", CASES)
def test_one_wrong_result_is_red(name):
    """As the runner does: everyone is called once, then compared. Outputs are spoilt in place, so that it shows as well
    where two share one memory, or where the gate's own references are written into what it is given."""
    seen = 0
    with Context(quick=True) as context, torch.inference_mode():
        for workload in load_case(name).workloads(context):
            outputs = {}
            for provider in workload.providers:
                try:
                    made = provider.ready()
                    assert made.call is not None
                    if made.before is not None:
                        made.before()
                    outputs[made.name] = made.call()
                except (Skip, *provider.refuses):
                    continue
            assert len(outputs) >= 2, f"{workload.name}: {list(outputs)}"
            assert workload.gate is not None and all(check.passed for check in workload.gate(outputs)), workload.name
            for spoilt, results in outputs.items():
                results = (results,) if isinstance(results, torch.Tensor) else results
                for n, result in enumerate(results):
                    kept = result.clone()
                    result.copy_(kept + kept.abs().max())
                    red = {check.name for check in workload.gate(outputs) if not check.passed}
                    assert f"{spoilt}, result {n}" in red, f"{workload.name}: {red}"
                    # The gradients of a sum's two terms are one tensor: more of the same one's may be red.
                    assert all(line.startswith(f"{spoilt}, ") for line in red), f"{workload.name}: {red}"
                    result.copy_(kept)
                    seen += 1
    assert seen >= 4
