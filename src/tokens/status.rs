//! What the Console calls a connection's token set: a decision on four facts and the time.

use crate::clock::Timestamp;

/// The word beside a user's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// A set is stored and its access token has not expired, as far as known.
    Active,
    /// A set is stored and its access token has expired; a refresh may help.
    Expired,
    /// Tokens could be stored, and none are.
    Inactive,
    /// The connector cannot store tokens.
    NotApplicable,
    /// The identity provider refused the refresh token: only the user can help.
    NeedsReauthorization,
}

/// What is known of a stored set without opening it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SetFacts {
    /// Seconds since the epoch; absent or 0: never, as far as known.
    pub expires_at: Option<i64>,
    /// Whether the identity provider answered `invalid_grant` to the last refresh.
    pub needs_reauth: bool,
    /// Whether a refresh token is stored. Shown beside the status and without effect on it: an expired set
    /// without one is `expired`, the word that clients know.
    pub has_refresh_token: bool,
}

impl Status {
    /// The name in the API.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Expired => "expired",
            Self::Inactive => "inactive",
            Self::NotApplicable => "not_applicable",
            Self::NeedsReauthorization => "needs_reauthorization",
        }
    }
}

/// The status of a connection's token set at `now`.
///
/// In the second in which a token expires this still says active, while a read of the token already refreshes
/// it: the Console of Logto rounds up and its API rounds down, and clients see both.
pub(super) fn status(stores_tokens: bool, set: Option<SetFacts>, now: Timestamp) -> Status {
    match set {
        _ if !stores_tokens => Status::NotApplicable,
        None => Status::Inactive,
        Some(set) if set.needs_reauth => Status::NeedsReauthorization,
        Some(SetFacts { expires_at: Some(at), .. }) if at != 0 && at < secs_rounded_up(now) => {
            Status::Expired
        }
        Some(_) => Status::Active,
    }
}

fn secs_rounded_up(now: Timestamp) -> i64 {
    let is_whole = now.as_micros().rem_euclid(1_000_000) == 0;
    now.as_secs() + i64::from(!is_whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expiring(at: Option<i64>) -> SetFacts {
        SetFacts { expires_at: at, needs_reauth: false, has_refresh_token: true }
    }

    #[test]
    fn the_second_of_expiry_is_the_last_active_one() {
        let rows = [
            // expiresAt, now in microseconds, status
            (Some(100), 99_500_000, Status::Active),
            (Some(100), 100_000_000, Status::Active),
            (Some(100), 100_000_001, Status::Expired),
            (Some(100), 100_100_000, Status::Expired),
            (Some(100), 101_000_000, Status::Expired),
            (None, i64::MAX, Status::Active),
            (Some(0), 100_000_000, Status::Active),
            (Some(-1), 100_000_000, Status::Expired),
            (Some(i64::MAX), i64::MAX, Status::Active),
            (Some(i64::MIN), i64::MIN, Status::Expired),
        ];
        for (at, micros, expected) in rows {
            let found = status(true, Some(expiring(at)), Timestamp::from_micros(micros));
            assert_eq!(found, expected, "{at:?} at {micros}");
        }
    }

    #[test]
    fn the_other_facts_decide_in_their_order() {
        let now = Timestamp::from_micros(200_000_000);
        let flagged = |at| Some(SetFacts { expires_at: at, needs_reauth: true, has_refresh_token: true });
        let dead = Some(SetFacts { expires_at: Some(1), needs_reauth: false, has_refresh_token: false });
        let rows = [
            (false, None, "not_applicable"),
            (false, flagged(Some(1)), "not_applicable"),
            (true, None, "inactive"),
            (true, flagged(Some(1)), "needs_reauthorization"),
            (true, flagged(Some(900)), "needs_reauthorization"),
            (true, flagged(None), "needs_reauthorization"),
            (true, dead, "expired"),
            (true, Some(expiring(Some(900))), "active"),
        ];
        for (stores_tokens, set, expected) in rows {
            assert_eq!(status(stores_tokens, set, now).name(), expected, "{set:?}");
        }
    }
}
