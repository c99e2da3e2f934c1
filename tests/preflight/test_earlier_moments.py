"""A run that began before AdamW's moments had a setting goes on as long as they stay float32."""

from __future__ import annotations

import json

import pytest

from tulu_mega.config import SftSettings
from tulu_mega.errors import UserError
from tulu_mega.preflight.same_run import same_run


@pytest.mark.parametrize(("moments", "refused"), [("fp32", False), ("bf16", True)])
def test_moments_were_float32(tmp_path, moments, refused):
    values = {"run_dir": str(tmp_path), "model": {"path": "model"}, "data": {"train": "rows.jsonl"}}
    written = json.loads(SftSettings.model_validate(values).model_dump_json())
    for section, name in (("optim", "moments"), ("parallel", "grad_dtype"), ("model", "recompute_layers")):
        del written[section][name]
    del written["ddp"], written["optimizer"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    now = SftSettings.model_validate({**values, "optim": {"moments": moments}})
    if refused:
        with pytest.raises(UserError, match=r"optim\.moments was None, is 'bf16'"):
            same_run(now)
    else:
        same_run(now)
