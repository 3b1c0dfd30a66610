"""The converted Mask2Former against mmdet's own model on random weights."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from eval.networks.mask2former import build_network, instances, masks_at_picture_size, unused_weights
from eval.networks.mask2former_keys import convert_mask2former

if any(importlib.util.find_spec(name) is None for name in ("mmdet", "mmengine", "mmcv")):
    pytest.skip("mmdet, mmengine and mmcv are not installed", allow_module_level=True)


class _NoExtension:
    """In place of mmcv's compiled operators: deformable attention has a version in plain torch."""

    def __getattr__(self, name: str) -> None:
        return None


def _mmdet_model() -> Any:
    """GenEval's detector as mmdet builds it, with no weight left at zero."""
    import mmcv

    # The newest mmcv without compiled operators is one release past what mmdet admits.
    mmcv.__version__ = "2.1.0"
    from mmcv.utils import ext_loader

    ext_loader.load_ext = lambda name, functions: _NoExtension()
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    folder = Path(mmdet.__file__).parent / ".mim" / "configs" / "mask2former"
    config = Config.fromfile(folder / "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py").model
    config.backbone.init_cfg = None
    torch.manual_seed(0)
    model = MODELS.build(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.slow
def test_class_and_mask_logits_and_objects_equal_mmdets() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = _mmdet_model()
        from mmdet.structures import DetDataSample
    ours = build_network().eval()
    ours.load_state_dict({**unused_weights(ours), **convert_mask2former(theirs.state_dict())})
    size = (224, 352)
    x_NCHW = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2))
    sample = DetDataSample(metainfo={"batch_input_shape": size, "img_shape": size, "ori_shape": size})
    with torch.inference_mode():
        out = ours(pixel_values=x_NCHW, output_hidden_states=True)
        classes, masks = (parts[-1] for parts in theirs.panoptic_head(theirs.extract_feat(x_NCHW), [sample]))
    torch.testing.assert_close(out.class_queries_logits, classes, atol=1e-4, rtol=0)
    torch.testing.assert_close(out.masks_queries_logits, masks, atol=1e-4, rtol=0)
    large = functional.interpolate(masks, size, mode="bilinear", align_corners=False)
    expected = theirs.panoptic_fusion_head.instance_postprocess(classes[0], large[0])
    found = instances(classes[0], masks_at_picture_size(masks[0], size, size, size))
    order = expected.scores.argsort(descending=True, stable=True)
    assert [item.score for item in found] == expected.scores[order].tolist()
    assert [item.class_number for item in found] == expected.labels[order].tolist()
    assert [list(item.box) for item in found] == expected.bboxes[order].tolist()
