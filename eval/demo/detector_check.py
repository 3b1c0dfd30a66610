"""Measure the detector on true pictures of the built-in scenes, and on pictures of other things.

python -m eval.demo.detector_check                 # a table: accuracy per category, clean and degraded
"""

from dataclasses import replace

from trainer.config import command_parser


def print_table(per_category: int, seed: int) -> None:
    """Ceilings: clean and degraded pictures at the default threshold, and at others."""
    import torch

    from eval.demo.ceiling import degrade, measure, negative_rates
    from eval.demo.detector import PICTURE_SIZE, DetectorConfig
    from eval.demo.prompts import demo_prompts, render_prompts
    from eval.demo.templates import gaussian_blur

    prompts = demo_prompts(seed, per_category)
    clean = render_prompts(prompts, PICTURE_SIZE)
    default = DetectorConfig()
    rows = [("true pictures", clean, default)]
    for blur, noise, shift in ((0.7, 0.05, 0.0), (0.7, 0.05, 0.08), (1.0, 0.08, 0.05)):
        name = f"blur {blur} noise {noise} shift {shift}"
        rows.append((name, degrade(clean, blur, noise, shift), default))
    hard = degrade(clean, 0.7, 0.05, 0.0)
    rows += [(f"blur 0.7, threshold {t}", hard, replace(default, min_score=t)) for t in (0.6, 0.65, 0.8)]
    noise_NHWC = torch.rand(clean.shape, generator=torch.Generator().manual_seed(seed))
    rows.append(("white noise", (noise_NHWC * 255).byte(), default))
    clouds_NCHW = gaussian_blur(noise_NHWC.permute(0, 3, 1, 2), 2.0)
    clouds_NHWC = (clouds_NCHW - 0.5).mul(5).add(0.5).clamp(0, 1).permute(0, 2, 3, 1)
    rows.append(("clouds (noise of blur 2)", (clouds_NHWC * 255).byte(), default))
    header = ["pictures", *dict.fromkeys(prompt.tag for prompt in prompts), "extra", "seconds"]
    print("  ".join(f"{title:>13s}" if i else f"{title:<34s}" for i, title in enumerate(header)))
    for name, pictures, config in rows:
        ceiling = measure(prompts, pictures, config)
        values = [f"{score.value:.3f}" for score in ceiling.summary.tags.values()]
        values += [f"{ceiling.extra_per_picture:.4f}", f"{ceiling.seconds:.1f}"]
        print(f"{name:<34s}  " + "  ".join(f"{value:>13s}" for value in values))
    print("\nan object is claimed in pictures of    60 other things    120 blends of two")
    for config in (default, replace(default, min_score=0.8, min_lead=0.0), replace(default, min_lead=0.0)):
        rates = negative_rates(config)
        print(f"score {config.min_score}, lead {config.min_lead:<22}  {rates.strangers:15.1%}  {rates.blends:19.1%}")


def main(argv: list[str] | None = None) -> None:
    """Command line of the measurement."""
    parser = command_parser("eval.demo.detector_check", __doc__)
    parser.add_argument("--per-category", type=int, default=40, help="pictures per tag (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes (default %(default)s)")
    given = parser.parse_args(argv)
    print_table(given.per_category, given.seed)


if __name__ == "__main__":
    main()
