"""Random events of tests/slurm/campaign.py, of kinds that are over in seconds, against an array of two runs.

Six, as each takes a quarter of a minute; continuous integration asks for twelve.
"""

import os
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster

sys.path.insert(0, str(Path(__file__).parent / "slurm"))
from campaign import Draws, Ledger, campaign
from campaign_runs import Site

EVENTS = int(os.environ.get("CAMPAIGN_EVENTS", "6"))
QUICK = (
    "rank KILL", "batch HUP", "RUN/save", "pause", "controller restarts",
)  # fmt: skip


@pytest.mark.slow
def test_whatever_happens_runs_end_as_if_nothing_had(cluster: Cluster, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "events.jsonl", events=EVENTS, minutes=15)
    campaign(Site(cluster, tmp_path, steps=50 * EVENTS), ledger, Draws(3, QUICK), ("task 0", "task 1"))
    assert not [record for record in ledger.records if record["finding"]]
    assert sum(record.get("recovered", False) for record in ledger.records) == EVENTS
    assert any("verified" in record for record in ledger.records), "else no metrics were compared"
