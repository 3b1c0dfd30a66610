"""One training run on the test cluster, and what must hold when it is complete."""

from pathlib import Path

from slurm_cluster import Cluster
from tests_launcher import Launcher, metrics

STEPS = 400
ROUTING = [f"moe/1/coverage_{count}" for count in range(5)]
PAIR = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
SETTINGS = (
    "debug", "model.dim=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "moe.num_experts=4",
    "data.image_size=8", "train.micro_batch_size=4", "parallel.ep_size=2", f"train.max_steps={STEPS}",
    "train.checkpoint_every=30",
)  # fmt: skip


class Story:
    """One run on the cluster."""

    def __init__(self, cluster: Cluster, folder: Path, name: str) -> None:
        self.cluster, self.folder = cluster, folder
        self.run, self.reference = folder / name, folder / "reference"
        self.job = ""

    def train(self, *overrides: str, options: tuple[str, ...] = PAIR, **environment: str) -> str:
        """Submit; the doctor is left out unless asked for."""
        environment = {"DOCTOR": "no", "TRAIN_SILENCE_SECONDS": "6"} | environment
        self.job = self.cluster.submit(
            "train", *SETTINGS, f"run_dir={self.run}", *overrides, options=options, **environment
        )
        return self.job

    def reach(self, step: int) -> None:
        """Wait until a step is logged."""
        self.cluster.until(lambda: (metrics(self.run) or [{"step": 0}])[-1]["step"] >= step, 240, self.job)

    def cut(self, node: str) -> None:
        """Power cut."""
        self.cluster.power_off(node)

    def nodes(self) -> list[str]:
        """Where the job runs."""
        return self.cluster.call("scontrol", "show", "hostnames", self.cluster.job(self.job)["NodeList"]).split()

    def rank_logs(self) -> str:
        """All that the processes said."""
        return "\n".join(path.read_text() for path in sorted((self.run / "logs").glob("*.log")))

    def make_data(self, size: int) -> list[str]:
        """Scenes of their own, encoded; returns the overrides, latents and size last."""
        images = self.folder / f"images_{size}"
        data = ["data.source=shards", f"data.images={images}", f"data.latents={self.folder / f'latents_{size}'}",
                f"data.image_size={size}"]  # fmt: skip
        words = ["--out", str(images), "--num-images", "32", "--image-size", str(size)]
        draw = ["-m", "trainer.data.demo.scene_shards", *words]
        for command in (draw, ["-m", "trainer.data.encode", "debug", *data]):
            assert Launcher().run(*command).returncode == 0, command
        return data

    def world_sizes(self) -> list[str]:
        """Number of processes of each start."""
        lines = [line for line in (self.run / "train.log").read_text().splitlines() if "ZeRO stage" in line]
        return [line.split(": ")[1].split()[0] for line in lines]

    def complete(self, *, bitwise: bool = True, restarts: int | None = None) -> None:
        """The job completes, and the trajectory is the unbroken one."""
        states = self.cluster.wait(self.job, seconds=400)
        assert states == ["COMPLETED"], (states, self.cluster.log(self.job))
        self.compare(bitwise=bitwise)
        if restarts is not None:
            assert int(self.cluster.job(self.job)["Restarts"]) >= restarts, self.cluster.log(self.job)

    def compare(self, *, bitwise: bool) -> None:
        """Every step once, in order, as in the unbroken run."""
        found, expected = metrics(self.run), metrics(self.reference)
        assert [entry["step"] for entry in found] == list(range(1, STEPS + 1))
        for a, b in zip(found, expected, strict=True):
            if not bitwise and any(a[name] != b[name] for name in ROUTING):
                assert a["step"] > STEPS // 2, (
                    "an expert's choice may hang on a rounding error once, not from the start"
                )
                return
            assert abs(a["loss"] - b["loss"]) <= (0 if bitwise else 1e-5 * abs(b["loss"])), (a, b)
