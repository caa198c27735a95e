//! What a read of a token set does. Pure: facts and times in, a decision out.

use std::time::Duration;

use crate::clock::Timestamp;

/// What a token set is going through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing goes on.
    Idle,
    /// A refresh was begun. Once its lease is over nobody knows whether the provider has seen it.
    Refreshing,
    /// Only the person can bring new tokens.
    NeedsReauth,
}

impl Phase {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Refreshing => "refreshing",
            Self::NeedsReauth => "needs_reauth",
        }
    }

    pub(super) fn parse(name: &str) -> Option<Self> {
        [Self::Idle, Self::Refreshing, Self::NeedsReauth].into_iter().find(|phase| phase.name() == name)
    }
}

/// What a decision goes by.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "facts that are each a yes or a no")]
pub(super) struct Facts {
    pub(super) phase: Phase,
    pub(super) has_refresh_token: bool,
    /// Seconds since the epoch.
    pub(super) expires_at: Option<i64>,
    /// When the request that brought the tokens began.
    pub(super) issued_at: Timestamp,
    /// Whether the lease of the refresh that goes on is over, by the database's clock.
    pub(super) lease_is_over: bool,
    /// Whether the one more try with an old refresh token is used up.
    pub(super) spent: bool,
    /// Whether the answer to the last request was lost: the provider may have ended the refresh token.
    pub(super) is_doubtful: bool,
    /// Until then the provider is not called: a failure before, or its connector's breaker.
    pub(super) wait_until: Timestamp,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// Release what is stored.
    Serve,
    /// Refresh, then look again.
    Refresh,
    /// Somebody is at it: look again.
    Wait,
    /// The provider failed and is not asked again yet.
    Later,
    /// There is no way but the person's. `mark`: it is not written down yet.
    Dead { mark: bool },
}

/// Decides. An access token that is valid is served whatever else holds; a refresh that may have been lost is repeated
/// once, and only when the old access token is no use any more.
pub(super) fn decide(facts: &Facts, now: Timestamp, leeway: Duration) -> Plan {
    let is_valid = is_valid(facts.expires_at, now);
    if is_valid && !is_due(facts, now, leeway) {
        return Plan::Serve;
    }
    match facts.phase {
        Phase::NeedsReauth => if_valid(is_valid, Plan::Dead { mark: false }),
        Phase::Refreshing if !facts.lease_is_over => if_valid(is_valid, Plan::Wait),
        Phase::Refreshing if facts.spent => if_valid(is_valid, Plan::Dead { mark: true }),
        Phase::Refreshing => if_valid(is_valid, or_later(facts, now)),
        Phase::Idle if !facts.has_refresh_token => if_valid(is_valid, Plan::Dead { mark: false }),
        // A second use of a refresh token may end the whole grant, with the access token that is alive still.
        Phase::Idle if facts.is_doubtful => if_valid(is_valid, or_later(facts, now)),
        Phase::Idle => match or_later(facts, now) {
            Plan::Refresh => Plan::Refresh,
            later => if_valid(is_valid, later),
        },
    }
}

fn or_later(facts: &Facts, now: Timestamp) -> Plan {
    if now < facts.wait_until { Plan::Later } else { Plan::Refresh }
}

const fn if_valid(is_valid: bool, otherwise: Plan) -> Plan {
    if is_valid { Plan::Serve } else { otherwise }
}

/// Contract, section 7.12: without leeway, in whole seconds; an absent or zero expiry is none.
pub(super) fn is_valid(expires_at: Option<i64>, now: Timestamp) -> bool {
    expires_at.filter(|at| *at != 0).is_none_or(|at| now.as_secs() < at)
}

/// Whether the expiry is within the leeway, which is never more than a tenth of the token's life: a short-lived token
/// would else be refreshed at every read.
fn is_due(facts: &Facts, now: Timestamp, leeway: Duration) -> bool {
    let Some(expires_at) = facts.expires_at.filter(|at| *at != 0) else { return false };
    let life = expires_at.saturating_sub(facts.issued_at.as_secs()).max(0);
    let leeway = i64::try_from(leeway.as_secs()).unwrap_or(i64::MAX).min(life / 10);
    now.as_secs() >= expires_at.saturating_sub(leeway)
}

/// The pause after the `failures`th failure in a row: doubles from one second to five minutes, less up to a half by
/// `jitter` (0 to 255), and never shorter than the provider asked for (an hour at the most).
pub(super) fn pause(failures: u64, asked: Option<Duration>, jitter: u8) -> Duration {
    let exponent = u32::try_from(failures.saturating_sub(1)).unwrap_or(u32::MAX).min(9);
    let full = Duration::from_secs(1).saturating_mul(1 << exponent).min(Duration::from_secs(300));
    let jittered = full.mul_f64(1.0 - f64::from(jitter) / 512.0);
    jittered.max(asked.unwrap_or_default().min(Duration::from_secs(3600)))
}

/// When a set is refreshed by itself: `ahead` seconds before expiry, earlier by up to a tenth of that, so that sets
/// which came together are not refreshed together. Never before half of its life is over.
pub(super) fn refresh_at(
    expires_at: Option<i64>,
    issued_at: Timestamp,
    has_refresh_token: bool,
    ahead: u64,
    jitter: u8,
) -> Option<Timestamp> {
    let expires_at = expires_at.filter(|at| *at != 0 && has_refresh_token && ahead > 0)?;
    let ahead = i64::try_from(ahead).unwrap_or(i64::MAX / 4);
    let early = ahead.saturating_add(ahead / 10 * i64::from(jitter) / 256);
    let half = issued_at.as_secs() + expires_at.saturating_sub(issued_at.as_secs()) / 2;
    let at = expires_at.saturating_sub(early).max(half);
    Some(Timestamp::from_micros(at.saturating_mul(1_000_000)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(seconds: i64) -> Timestamp {
        Timestamp::from_micros(seconds * 1_000_000)
    }

    /// Issued at 0, lives 1000 s.
    fn facts() -> Facts {
        Facts {
            phase: Phase::Idle,
            has_refresh_token: true,
            expires_at: Some(1000),
            issued_at: at(0),
            lease_is_over: false,
            spent: false,
            is_doubtful: false,
            wait_until: at(0),
        }
    }

    fn plan(facts: &Facts, seconds: i64) -> Plan {
        decide(facts, at(seconds), Duration::from_secs(60))
    }

    #[test]
    fn a_token_is_refreshed_within_the_leeway_and_after_expiry() {
        let idle = facts();
        for (now, wanted) in
            [(0, Plan::Serve), (939, Plan::Serve), (940, Plan::Refresh), (1000, Plan::Refresh)]
        {
            assert_eq!(plan(&idle, now), wanted, "{now}");
        }
        for eternal in [None, Some(0)] {
            assert_eq!(plan(&Facts { expires_at: eternal, ..facts() }, 9999), Plan::Serve);
        }
    }

    #[test]
    fn a_short_lived_token_has_a_short_leeway() {
        let short = Facts { expires_at: Some(50), ..facts() };
        for (now, wanted) in [(0, Plan::Serve), (44, Plan::Serve), (45, Plan::Refresh)] {
            assert_eq!(plan(&short, now), wanted, "{now}");
        }
    }

    #[test]
    fn without_a_refresh_token_it_is_served_until_it_expires() {
        let bare = Facts { has_refresh_token: false, ..facts() };
        assert_eq!(plan(&bare, 999), Plan::Serve);
        assert_eq!(plan(&bare, 1000), Plan::Dead { mark: false });
    }

    #[test]
    fn a_dead_grant_is_served_until_its_token_expires() {
        let dead = Facts { phase: Phase::NeedsReauth, ..facts() };
        assert_eq!(plan(&dead, 950), Plan::Serve);
        assert_eq!(plan(&dead, 1000), Plan::Dead { mark: false });
    }

    #[test]
    fn while_somebody_refreshes_the_old_token_is_served_and_after_it_one_waits() {
        let refreshing = Facts { phase: Phase::Refreshing, ..facts() };
        assert_eq!(plan(&refreshing, 950), Plan::Serve);
        assert_eq!(plan(&refreshing, 1000), Plan::Wait);
    }

    #[test]
    fn a_refresh_that_may_be_lost_is_repeated_once_and_only_when_it_must_be() {
        let uncertain = Facts { phase: Phase::Refreshing, lease_is_over: true, ..facts() };
        assert_eq!(plan(&uncertain, 950), Plan::Serve);
        assert_eq!(plan(&uncertain, 1000), Plan::Refresh);
        let waits = Facts { wait_until: at(1100), ..uncertain.clone() };
        assert_eq!(plan(&waits, 1000), Plan::Later);
        let spent = Facts { spent: true, ..uncertain };
        assert_eq!(plan(&spent, 999), Plan::Serve);
        assert_eq!(plan(&spent, 1000), Plan::Dead { mark: true });
    }

    #[test]
    fn while_an_answer_may_be_lost_a_living_token_is_not_put_at_risk() {
        let doubtful = Facts { is_doubtful: true, ..facts() };
        assert_eq!(plan(&doubtful, 950), Plan::Serve);
        assert_eq!(plan(&doubtful, 1000), Plan::Refresh);
    }

    #[test]
    fn after_a_failure_the_provider_is_left_alone_for_a_while() {
        let failed = Facts { wait_until: at(1010), ..facts() };
        assert_eq!(plan(&failed, 950), Plan::Serve);
        assert_eq!(plan(&failed, 1009), Plan::Later);
        assert_eq!(plan(&failed, 1010), Plan::Refresh);
    }

    #[test]
    fn pauses_double_are_spread_and_heed_the_provider() {
        assert_eq!(pause(1, None, 0), Duration::from_secs(1));
        assert_eq!(pause(4, None, 0), Duration::from_secs(8));
        assert_eq!(pause(u64::MAX, None, 0), Duration::from_secs(300));
        assert_eq!(pause(4, None, 128), Duration::from_secs(6));
        assert_eq!(pause(1, Some(Duration::from_secs(120)), 0), Duration::from_secs(120));
        assert_eq!(pause(1, Some(Duration::from_secs(999_999)), 0), Duration::from_secs(3600));
    }

    #[test]
    fn a_refresh_ahead_is_spread_and_comes_after_half_of_the_life() {
        assert_eq!(refresh_at(Some(1000), at(0), true, 100, 0), Some(at(900)));
        assert_eq!(refresh_at(Some(1000), at(0), true, 100, 255), Some(at(891)));
        assert_eq!(refresh_at(Some(1000), at(0), true, 900, 0), Some(at(500)));
        for none in [
            refresh_at(None, at(0), true, 100, 0),
            refresh_at(Some(1000), at(0), false, 100, 0),
            refresh_at(Some(1000), at(0), true, 0, 0),
        ] {
            assert_eq!(none, None);
        }
    }
}
