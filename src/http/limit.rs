//! How many requests one principal may make. Counted in this process; 0 turns it off.

use std::fmt;
use std::hash::Hash;
use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use serde::Deserialize;

/// `[server.rate_limit]`. High by default: it stops a runaway client, it does not shape traffic.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimit {
    /// Requests per second and principal; 0 turns the limit off.
    pub per_second: u32,
    /// Requests at once after a pause.
    pub burst: u32,
}

impl Default for RateLimit {
    fn default() -> Self {
        Self { per_second: 5000, burst: 10_000 }
    }
}

/// Counts requests by key.
pub struct Limiter<K: Hash + Eq + Clone>(Option<DefaultKeyedRateLimiter<K>>);

impl<K: Hash + Eq + Clone> fmt::Debug for Limiter<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Limiter").field(&self.0.as_ref().map(RateLimiter::len)).finish()
    }
}

impl<K: Hash + Eq + Clone> Limiter<K> {
    /// A limiter with nothing counted yet.
    pub fn new(limit: RateLimit) -> Self {
        let quota = NonZeroU32::new(limit.per_second).map(Quota::per_second);
        let burst = NonZeroU32::new(limit.burst);
        Self(quota.map(|quota| RateLimiter::keyed(burst.map_or(quota, |burst| quota.allow_burst(burst)))))
    }

    /// # Errors
    /// How long to wait, if `key` has used up its share.
    pub fn check(&self, key: &K) -> Result<(), Duration> {
        let Some(limiter) = &self.0 else { return Ok(()) };
        limiter.check_key(key).map_err(|not_yet| not_yet.wait_time_from(DefaultClock::default().now()))
    }

    /// Forgets keys whose share is whole again, so that keys a client makes up do not pile up.
    pub fn forget_idle(&self) {
        if let Some(limiter) = &self.0 {
            limiter.retain_recent();
            limiter.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_served_and_the_next_request_waits() {
        let limiter = Limiter::new(RateLimit { per_second: 1, burst: 2 });

        assert!(limiter.check(&"a").is_ok() && limiter.check(&"a").is_ok());
        assert!(limiter.check(&"a").unwrap_err() <= Duration::from_secs(1));
        assert!(limiter.check(&"b").is_ok(), "another principal has its own share");
    }

    #[test]
    fn zero_means_no_limit() {
        let limiter = Limiter::new(RateLimit { per_second: 0, burst: 0 });
        assert!((0..10_000).all(|_| limiter.check(&"a").is_ok()));
    }
}
