//! Refusals that anybody can cause as often as they like.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

use crate::audit::{AuditLog, Event, Outcome};
use crate::identity::Caller;

const PER_SECOND: NonZeroU32 = NonZeroU32::new(5).unwrap();
const AT_ONCE: NonZeroU32 = NonZeroU32::new(20).unwrap();

/// Records a few refusals per second and counts the others: who is not let in must not be able to
/// fill the log.
pub struct Refusals {
    audit: AuditLog,
    limiter: DefaultDirectRateLimiter,
    unrecorded: AtomicU64,
}

impl Refusals {
    /// With nothing counted yet.
    pub fn new(audit: AuditLog) -> Self {
        let limiter = RateLimiter::direct(Quota::per_second(PER_SECOND).allow_burst(AT_ONCE));
        Self { audit, limiter, unrecorded: AtomicU64::new(0) }
    }

    /// Records a refusal, with the number of those left out since the last one, or counts it. Nothing
    /// waits for the record: nothing was done, so there is nothing to keep back.
    pub fn record(&self, caller: &Caller, event: Event, outcome: Outcome) {
        if self.limiter.check().is_err() {
            self.unrecorded.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let unrecorded = self.unrecorded.swap(0, Ordering::Relaxed);
        let event = event.detail("unrecorded", unrecorded.to_string());
        self.audit.record_soon(caller, event, outcome);
    }
}
