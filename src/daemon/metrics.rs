//! The metrics recorder and the gauges that are read off when somebody looks. Names are those of
//! `docs/api.md`; no label carries an id, a name or a path.

use std::sync::{Mutex, PoisonError};

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use metrics_process::Collector;

use crate::seal::guarded::Status as Memory;
use crate::seal::{DeviceState, DeviceStatus};
use crate::vault::Figures;

/// From a cached read to the deadline of a device call.
const SECONDS: [f64; 12] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5];

pub(super) struct Metrics {
    handle: PrometheusHandle,
    process: Collector,
    last: Mutex<Figures>,
}

impl Metrics {
    /// Makes the process's recorder. In a process with several daemons (tests) the first one counts
    /// for all; the others render what they alone would have counted: nothing.
    pub(super) fn install() -> Self {
        let builder = PrometheusBuilder::new();
        let suffix = Matcher::Suffix("_duration_seconds".to_owned());
        let builder = builder.set_buckets_for_metric(suffix, &SECONDS).unwrap_or_else(|error| {
            tracing::warn!(%error, "histograms have no buckets");
            PrometheusBuilder::new()
        });
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::debug!("another daemon in this process records the metrics");
        }
        describe();
        let process = Collector::default();
        process.describe();
        gauge!("lacre_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
        // Present from the start, so that a rate over it is defined.
        counter!("lacre_auth_failures_total", "reason" => "invalid-token").absolute(0);
        counter!("lacre_sealer_restarts_total").absolute(0);
        Self { handle, process, last: Mutex::default() }
    }

    pub(super) fn upkeep(&self) {
        self.handle.run_upkeep();
    }

    pub(super) fn set_state(
        &self,
        (is_ready, is_quarantined): (bool, bool),
        anchored: Option<(u64, bool)>,
        missing: usize,
        memory: &Memory,
        devices: &[DeviceStatus],
    ) {
        gauge!("lacre_hsm_keys_missing").set(as_figure(missing as u64));
        gauge!("lacre_rollback_detection").set(f64::from(u8::from(anchored.is_some())));
        if let Some((generation, agrees)) = anchored {
            gauge!("lacre_anchor_ok").set(f64::from(u8::from(agrees)));
            gauge!("lacre_anchor_generation").set(as_figure(generation));
        }
        gauge!("lacre_ready").set(f64::from(u8::from(is_ready)));
        gauge!("lacre_quarantine").set(f64::from(u8::from(is_quarantined)));
        gauge!("lacre_guard_slots", "state" => "free").set(as_figure(memory.free as u64));
        let used = memory.slots.saturating_sub(memory.free);
        gauge!("lacre_guard_slots", "state" => "used").set(as_figure(used as u64));
        for device in devices {
            let name = || device.name.to_string();
            let is_up = device.state == DeviceState::Ready;
            gauge!("lacre_hsm_up", "device" => name()).set(f64::from(u8::from(is_up)));
            for (lane, queued) in ["fast", "slow", "admin"].into_iter().zip(device.queued) {
                gauge!("lacre_hsm_queue", "device" => name(), "lane" => lane).set(as_figure(queued as u64));
            }
        }
        self.process.collect();
    }

    /// What was counted before and is not there any more goes down to 0.
    pub(super) fn set_figures(&self, figures: &Figures) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        for kind in last.secrets.keys().chain(figures.secrets.keys()) {
            let count = figures.secrets.get(kind).copied().unwrap_or(0);
            gauge!("lacre_secrets", "kind" => *kind).set(as_figure(count));
        }
        for version in last.records_by_kek_version.keys().chain(figures.records_by_kek_version.keys()) {
            let count = figures.records_by_kek_version.get(version).copied().unwrap_or(0);
            gauge!("lacre_wrapped_by_kek_version", "version" => version.to_string()).set(as_figure(count));
        }
        last.clone_from(figures);
        gauge!("lacre_jobs_open").set(as_figure(figures.open_jobs));
        if let Some(count) = figures.without_backup {
            gauge!("lacre_records_without_backup").set(as_figure(count));
        }
    }

    pub(super) fn render(&self) -> String {
        self.handle.render()
    }
}

#[expect(clippy::cast_precision_loss, reason = "a gauge above 2^53 is as good rounded")]
fn as_figure(count: u64) -> f64 {
    count as f64
}

fn describe() {
    describe_counter!("lacre_http_requests_total", "Requests by route, method and status.");
    describe_histogram!("lacre_http_request_duration_seconds", "Time to answer, by route.");
    describe_counter!("lacre_auth_failures_total", "Requests refused for want of a valid credential.");
    describe_gauge!("lacre_ready", "1 while all readiness checks pass.");
    describe_gauge!("lacre_hsm_up", "1 while the device is logged in and answering.");
    describe_gauge!("lacre_hsm_keys_missing", "Keys that were made and are not on the device any more.");
    describe_gauge!("lacre_hsm_queue", "Jobs waiting for the device, by lane.");
    describe_counter!("lacre_sealer_restarts_total", "Sealer processes that ended and were replaced.");
    describe_gauge!("lacre_guard_slots", "Slots of guarded memory, by state.");
    describe_gauge!("lacre_secrets", "Stored secrets by kind.");
    describe_gauge!("lacre_wrapped_by_kek_version", "Stored records by the KEK version that wraps them.");
    describe_gauge!("lacre_jobs_open", "Jobs that have not ended.");
    describe_gauge!("lacre_records_without_backup", "Stored records without a wrap under the backup KEK.");
    describe_gauge!("lacre_quarantine", "1 while the installation is in quarantine after a restore.");
    describe_gauge!("lacre_rollback_detection", "1 where an old copy of the database would be noticed.");
    describe_gauge!("lacre_anchor_ok", "1 while database and anchor agree and the counter is reached.");
    describe_gauge!("lacre_anchor_generation", "Value of the roll-back anchor's counter.");
    describe_gauge!("lacre_build_info", "Always 1; the version is a label.");
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::{Collector, Metrics, Mutex};
    use crate::vault::Figures;

    #[test]
    fn what_is_not_there_any_more_goes_down_to_zero() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let (handle, process, last) = (recorder.handle(), Collector::default(), Mutex::default());
        let metrics = Metrics { handle, process, last };
        let figures = |kind, version| Figures {
            secrets: BTreeMap::from([(kind, 3)]),
            records_by_kek_version: BTreeMap::from([(version, 3)]),
            open_jobs: 0,
            without_backup: None,
        };
        metrics::with_local_recorder(&recorder, || {
            metrics.set_figures(&figures("opaque", 1));
            metrics.set_figures(&figures("json", 2));
        });

        let text = metrics.render();
        for line in [
            "lacre_secrets{kind=\"opaque\"} 0",
            "lacre_secrets{kind=\"json\"} 3",
            "lacre_wrapped_by_kek_version{version=\"1\"} 0",
            "lacre_wrapped_by_kek_version{version=\"2\"} 3",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
