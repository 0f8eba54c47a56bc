from __future__ import annotations

import numpy as np
import pytest
import torch

from swiftvideo.export.models.schedule import Schedule
from swiftvideo.runtime.errors import SettingsError
from tests.export.models import golden


def test_sigmas_and_times_are_the_recorded_ones() -> None:
    units, schedule = golden.arrays("units"), Schedule()
    golden.close(torch.from_numpy(schedule.sigmas), units["sched_sigmas"], 2e-7)
    golden.close(torch.from_numpy(schedule.timesteps), units["sched_timesteps"], 2e-4)  # 1 ulp of 1000
    golden.close(torch.from_numpy(schedule.steps), units["denoising_steps"], 1e-4)
    assert schedule.passes.tolist() == [*schedule.steps.tolist(), 0.0]


def test_sigma_of_time_zero_is_the_last_of_the_grid() -> None:
    assert Schedule().sigma_of(0) == pytest.approx(0.00498, abs=1e-5)
    assert Schedule().sigma_of(1000) == 1.0
    np.testing.assert_allclose(Schedule().pass_sigmas, [1, 0.9375, 0.8333333, 0.625, 5 / 1004], atol=1e-6)


def test_x0_and_noising_with_these_sigmas_are_the_recorded_ones() -> None:
    units, schedule = golden.arrays("units"), Schedule()
    sigma = torch.tensor([schedule.sigma_of(float(t)) for t in units["x0_t"]], dtype=torch.float64)
    sigma = sigma[:, None, None, None]
    x, flow = units["x0_xt"].double(), units["x0_flow"].double()
    golden.close(x - sigma * flow, units["x0_out"], 1e-5)
    golden.close((1 - sigma) * x + sigma * flow, units["addnoise_out"], 1e-5)


@pytest.mark.parametrize(
    "wrong",
    [{"shift": 0}, {"indices": ()}, {"indices": (1001,)}, {"indices": (250, 500)}, {"indices": (500, 0)}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        Schedule(**wrong)  # type: ignore[arg-type]
