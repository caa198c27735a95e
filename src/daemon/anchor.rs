//! The roll-back anchor: a counter in the device that an old copy of the database cannot follow.
//!
//! Once a period, when there is something new in the audit log, the number that the counter is about to have is
//! recorded there, with the log's end and a MAC by the device over both; then the counter is advanced. So the
//! counter is never lower than the database but for the one step that a crash leaves, and a start finishes
//! that step. A database that knows less than the counter is an old one: the daemon does not start on it.
//!
//! Taking a database as the present one, for the first time or after a restore, is a person's act
//! ([`accept`]). What is noticed is the roll-back of the whole database by more than a period (reliability.md, D2).

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use super::RunError;
use super::health::{Health, chain};
use super::services::{ProvisionError, Services, StartError};
use crate::audit::{Action, AuditError, AuditLog, Checkpoint, Event, Outcome, Record};
use crate::clock::{Clock, Timestamp};
use crate::config::{AnchorConfig, Config};
use crate::db::{Db, DbError, Turn, TurnName};
use crate::http::Check;
use crate::identity::Caller;
use crate::ids::TenantId;
use crate::keys::{Keys, KeysError};
use crate::seal::{Count, DeviceName, KeyAdmin, SealError};

/// How long a start waits for devices that do not answer.
const PATIENCE: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(500);
/// How often the counter is looked at, at the least.
const LOOK: Duration = Duration::from_secs(60);
/// How long the last step may hold up an orderly end.
const AT_LAST: Duration = Duration::from_secs(5);

/// Why the database is not taken for the present one.
#[derive(Debug, thiserror::Error)]
pub enum AnchorError {
    /// The counter has gone on without this database.
    #[error(
        "the database is older than its anchor: it knows generation {}, and the counter of the device `{device}` \
         is at {counter}. See docs/operations/anchor.md; if it was put back on purpose: lacre anchor accept",
        known.map_or_else(|| "none".to_owned(), |known| known.to_string())
    )]
    Older {
        /// Where the counter is.
        device: DeviceName,
        /// What the database says; `None` if it was never anchored.
        known: Option<u64>,
        /// What the device says.
        counter: u64,
    },
    /// The counter is not the one that the database knows.
    #[error(
        "the anchor's counter on the device `{device}` is not the one that the database knows: it is at {}, and \
         the database is at generation {known}. See docs/operations/anchor.md",
        counter.map_or_else(|| "nothing, it is gone".to_owned(), |counter| counter.to_string())
    )]
    Replaced {
        /// Where the counter is.
        device: DeviceName,
        /// What the database says.
        known: u64,
        /// What the device says; `None` if there is no counter.
        counter: Option<u64>,
    },
    /// Nobody has taken the database as the one to be anchored.
    #[error("[anchor] is configured and the database has no anchor yet: run `lacre anchor accept`")]
    NotAccepted,
    /// The database's own word on its generation is not this installation's.
    #[error(
        "the record of the database's generation {generation} is not genuine: {reason}. See docs/operations/anchor.md"
    )]
    NotGenuine {
        /// What it says.
        generation: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// To override the anchor takes two persons.
    #[error("this overrides the anchor ({0}); it takes two persons: give --by twice, with two names")]
    OnePerson(Box<Self>),
    /// The device with the counter.
    #[error("the anchor's device `{device}` cannot be asked")]
    Device {
        /// Its name.
        device: DeviceName,
        /// What it said.
        source: SealError,
    },
    /// The key for the MAC.
    #[error("the anchor cannot be checked")]
    Keys(#[from] KeysError),
    /// The audit log.
    #[error("the anchor's records cannot be read or written")]
    Audit(#[from] AuditError),
    /// Another daemon has the turn, or the database failed.
    #[error("the anchor's records cannot be read")]
    Db(#[from] DbError),
}

impl AnchorError {
    /// Whether database and device were asked, and do not agree.
    const fn is_verdict(&self) -> bool {
        matches!(self, Self::Older { .. } | Self::Replaced { .. } | Self::NotGenuine { .. })
    }

    /// Whether it may go by itself: nothing was compared.
    const fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Device { source, .. } | Self::Keys(KeysError::Seal(source))
                if matches!(
                    source,
                    SealError::Unavailable { .. } | SealError::Unknown { .. } | SealError::Busy { .. }
                )
        )
    }
}

/// What a counter means for a database.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// They agree.
    Present,
    /// A crash came before the counter was advanced.
    Finish,
    Older,
    Replaced,
    /// Neither knows of an anchor.
    Never,
}

fn judge(known: Option<u64>, counter: Option<u64>) -> Verdict {
    match (known, counter) {
        (None, None) => Verdict::Never,
        (Some(known), Some(counter)) if known == counter => Verdict::Present,
        (Some(known), Some(counter)) if Some(known) == counter.checked_add(1) => Verdict::Finish,
        (Some(known), Some(counter)) if known < counter => Verdict::Older,
        (None, Some(_)) => Verdict::Older,
        (Some(_), _) => Verdict::Replaced,
    }
}

/// Whether the counter is to be advanced now. The chip's memory wears out, so never twice in a period, over
/// restarts too; a clock that was put back must not stop it for ever.
fn is_due(mark: &Mark, head: &Checkpoint, now: Timestamp, period: Duration) -> bool {
    head.seq > mark.seq && (now < mark.at || now.since(mark.at) >= period)
}

/// What the audit log says of the anchor, last.
struct Mark {
    /// The number of its record.
    seq: u64,
    at: Timestamp,
    generation: u64,
    /// The log's end when it was made.
    upto: Checkpoint,
    mac: Vec<u8>,
}

impl Mark {
    fn read(record: &Record) -> Option<Self> {
        #[derive(Deserialize)]
        struct Body {
            time: String,
            details: Details,
        }
        #[derive(Deserialize)]
        struct Details {
            generation: String,
            upto: String,
            upto_hash: String,
            mac: String,
        }
        let Body { time, details } = serde_json::from_str(&record.body).ok()?;
        Some(Self {
            seq: record.seq,
            at: Timestamp::parse_rfc3339(&time)?,
            generation: details.generation.parse().ok()?,
            upto: Checkpoint {
                seq: details.upto.parse().ok()?,
                hash: hex::decode(details.upto_hash).ok()?.try_into().ok()?,
            },
            mac: hex::decode(details.mac).ok()?,
        })
    }
}

/// What is shown of the anchor.
#[derive(Clone)]
struct Shown {
    generation: u64,
    advanced_at: Timestamp,
    problem: Option<String>,
    /// Whether the problem is that database and counter do not agree.
    is_verdict: bool,
}

/// The anchor of a running daemon.
pub(super) struct Anchor {
    parts: Parts,
    shown: RwLock<Shown>,
}

/// What the anchor is made of.
#[derive(Clone)]
pub(super) struct Parts {
    config: AnchorConfig,
    tenant: TenantId,
    db: Db,
    audit: AuditLog,
    keys: Keys,
    admin: KeyAdmin,
    clock: Arc<dyn Clock>,
}

impl Parts {
    /// Of the services of an installation with an anchor.
    pub(super) fn of(services: &Services) -> Option<Self> {
        Some(Self {
            config: services.config.anchor.clone()?,
            tenant: services.config.tenant.clone(),
            db: services.db.clone(),
            audit: services.audit.clone(),
            keys: services.keys.clone(),
            admin: services.devices.admin.clone(),
            clock: Arc::clone(&services.clock),
        })
    }

    /// The turn lasts until the device has ended the call, also where that is long after this gave up.
    async fn count(&self, count: Count, turn: &Arc<Turn>) -> Result<Option<u64>, AnchorError> {
        let device = &self.config.device;
        let counted = self.admin.count_holding(device, count, Arc::clone(turn)).await;
        counted.map_err(|source| AnchorError::Device { device: device.clone(), source })
    }

    async fn mac(&self, generation: u64, upto: &Checkpoint) -> Result<[u8; 32], AnchorError> {
        let device = self.config.device.as_str().as_bytes();
        let parts = [device, &generation.to_be_bytes(), &upto.seq.to_be_bytes(), &upto.hash];
        Ok(self.keys.mac_anchor(&self.tenant, &parts).await?)
    }

    /// The last record of the anchor; `None` if there is none, or if it is damaged beyond reading.
    async fn mark(&self) -> Result<Option<Mark>, AnchorError> {
        let record = self.audit.last_of_anchor(&self.tenant).await?;
        Ok(record.as_ref().and_then(Mark::read))
    }

    /// Whoever writes to the database can write a record too, and cannot make its MAC; and a record that was
    /// copied from a later state has an end of the log that is not here.
    async fn prove(&self, mark: &Mark) -> Result<(), AnchorError> {
        let fail = |reason| Err(AnchorError::NotGenuine { generation: mark.generation, reason });
        let mac = self.mac(mark.generation, &mark.upto).await?;
        if aws_lc_rs::constant_time::verify_slices_are_equal(&mac, &mark.mac).is_err() {
            return fail("its MAC is another one");
        }
        match self.audit.hash_at(mark.upto.seq).await? {
            Some(hash) if hash == mark.upto.hash => Ok(()),
            Some(_) => fail("the audit log up to it is another one"),
            None => fail("the audit log up to it is not here"),
        }
    }

    /// Compares database and counter, and finishes a step that a crash came into. What speaks against the
    /// database is looked at twice: a device's answer that was altered on the way is no evidence.
    async fn check(&self, turn: &Arc<Turn>) -> Result<Mark, AnchorError> {
        match self.compare(turn).await {
            Err(error) if error.is_verdict() => self.compare(turn).await,
            other => other,
        }
    }

    async fn compare(&self, turn: &Arc<Turn>) -> Result<Mark, AnchorError> {
        let device = || self.config.device.clone();
        let mark = self.mark().await?;
        let counter = self.count(Count::Read, turn).await?;
        let known = mark.as_ref().map(|mark| mark.generation);
        let verdict = judge(known, counter);
        match (verdict, mark, counter) {
            (Verdict::Present, Some(mark), _) => self.prove(&mark).await.map(|()| mark),
            (Verdict::Finish, Some(mark), Some(counter)) => {
                self.prove(&mark).await?;
                self.step(counter, turn).await?;
                Ok(mark)
            }
            (Verdict::Replaced, Some(mark), counter) => {
                Err(AnchorError::Replaced { device: device(), known: mark.generation, counter })
            }
            (_, _, Some(counter)) => Err(AnchorError::Older { device: device(), known, counter }),
            (_, _, None) => Err(AnchorError::NotAccepted),
        }
    }

    /// Advances the counter from this value, which it has.
    async fn step(&self, from: u64, turn: &Arc<Turn>) -> Result<(), AnchorError> {
        let device = || self.config.device.clone();
        match self.count(Count::Advance { from }, turn).await? {
            Some(now) if Some(now) == from.checked_add(1) => Ok(()),
            Some(counter) => Err(AnchorError::Older { device: device(), known: Some(from), counter }),
            None => Err(AnchorError::Replaced { device: device(), known: from, counter: None }),
        }
    }

    /// Records the generation behind `counter`; the counter's own step comes after it.
    async fn record(&self, counter: u64, event: Event, caller: &Caller) -> Result<u64, AnchorError> {
        let upto = self.audit.head().await?;
        let generation = counter.saturating_add(1);
        let mac = self.mac(generation, &upto).await?;
        let event = event
            .detail("generation", generation.to_string())
            .detail("upto", upto.seq.to_string())
            .detail("upto_hash", hex::encode(upto.hash))
            .detail("mac", hex::encode(mac));
        self.audit.record(caller, event, Outcome::Success).await?;
        Ok(generation)
    }

    /// What is overridden by taking the database as it is, and where the counter is, which is made where there
    /// is none; `None` if database and counter agree.
    async fn to_accept(
        &self,
        by: &[String],
        turn: &Arc<Turn>,
    ) -> Result<Option<(Option<AnchorError>, u64)>, AnchorError> {
        let overridden = match self.check(turn).await {
            Ok(_) => return Ok(None),
            Err(AnchorError::NotAccepted) => None,
            Err(error) if !error.is_verdict() => return Err(error),
            Err(error) if by.iter().collect::<BTreeSet<_>>().len() < 2 => {
                return Err(AnchorError::OnePerson(Box::new(error)));
            }
            Err(error) => Some(error),
        };
        let device = || self.config.device.clone();
        let made = self.count(Count::Make, turn).await?;
        let counter =
            made.ok_or_else(|| AnchorError::Replaced { device: device(), known: 0, counter: None })?;
        Ok(Some((overridden, counter)))
    }

    /// Takes the database as it is; its generation from now on.
    async fn take(
        &self,
        Acceptance { by, reason }: &Acceptance,
        overridden: Option<&AnchorError>,
        counter: u64,
        turn: &Arc<Turn>,
    ) -> Result<u64, AnchorError> {
        let mut event = self.event(Action::AnchorAccept).detail("by", by.join(", ")).detail("reason", reason);
        if let Some(AnchorError::Older { known, .. }) = overridden {
            event = event.detail("known", known.map_or_else(|| "none".to_owned(), |known| known.to_string()));
        }
        if overridden.is_some() {
            event = event.detail("counter", counter.to_string());
        }
        let caller = Caller::system("anchor", self.tenant.clone());
        let generation = self.record(counter, event, &caller).await?;
        self.step(counter, turn).await?;
        Ok(generation)
    }

    fn event(&self, action: Action) -> Event {
        Event::new(action, "anchor", self.config.device.as_str())
    }
}

impl Anchor {
    /// Compares the database with its anchor. Waits a while for devices that do not answer yet.
    ///
    /// # Errors
    /// [`AnchorError`]: the daemon must not serve this database, or cannot know yet.
    pub(super) async fn open(parts: Parts) -> Result<Self, AnchorError> {
        let began = Instant::now();
        let turn = Arc::new(parts.db.turn(TurnName::Anchor).await?);
        let mark = loop {
            match parts.check(&turn).await {
                Ok(mark) => break mark,
                Err(error) if error.is_passing() && began.elapsed() < PATIENCE => {
                    tracing::warn!(problem = chain(&error), "the anchor cannot be compared yet");
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(error),
            }
        };
        let (generation, advanced_at) = (mark.generation, mark.at);
        let shown = Shown { generation, advanced_at, problem: None, is_verdict: false };
        Ok(Self { parts, shown: RwLock::new(shown) })
    }

    /// Advances the counter if it is time and there is something new.
    pub(super) async fn advance(&self) {
        let advanced = self.try_advance().await;
        let is_verdict = advanced.as_ref().is_err_and(AnchorError::is_verdict);
        let mut shown = self.shown.write().unwrap_or_else(PoisonError::into_inner);
        let problem = match advanced {
            Ok((generation, at)) => {
                (shown.generation, shown.advanced_at) = (generation, at);
                None
            }
            Err(error) => Some(chain(&error)),
        };
        if problem != shown.problem {
            match &problem {
                Some(problem) if is_verdict => {
                    tracing::error!(problem, "the database is not the one that is anchored");
                    let caller = Caller::system("anchor", self.parts.tenant.clone());
                    let event = self.parts.event(Action::AnchorIncident).detail("problem", problem);
                    self.parts.audit.record_soon(&caller, event, Outcome::Failure("anchor-disagrees"));
                }
                Some(problem) => tracing::error!(problem, "the roll-back anchor cannot be advanced"),
                None => tracing::info!("the roll-back anchor is advanced again"),
            }
        }
        (shown.problem, shown.is_verdict) = (problem, is_verdict);
    }

    /// The last step before an orderly end, if it is due. What does not come to its end in time is made
    /// good by the next start.
    pub(super) async fn advance_at_last(&self) {
        if tokio::time::timeout(AT_LAST, self.advance()).await.is_err() {
            tracing::warn!("the roll-back anchor was not advanced before the end");
        }
    }

    async fn try_advance(&self) -> Result<(u64, Timestamp), AnchorError> {
        let parts = &self.parts;
        // Among all daemons of this database: their steps must not mix.
        let turn = Arc::new(parts.db.turn(TurnName::Anchor).await?);
        let mark = parts.check(&turn).await?;
        let now = parts.clock.now();
        if !is_due(&mark, &parts.audit.head().await?, now, parts.config.period) {
            return Ok((mark.generation, mark.at));
        }
        let caller = Caller::system("anchor", parts.tenant.clone());
        let generation = parts.record(mark.generation, parts.event(Action::AnchorAdvance), &caller).await?;
        parts.step(mark.generation, &turn).await?;
        Ok((generation, now))
    }

    /// A daemon on a database that is not the anchored one is not ready; a counter that cannot be reached now
    /// keeps nobody away.
    pub(super) fn check(&self) -> Check {
        let shown = self.shown.read().unwrap_or_else(PoisonError::into_inner);
        Check { name: "anchor".into(), problem: shown.problem.clone(), is_needed: shown.is_verdict }
    }

    /// Whether database and counter agreed when they were last compared.
    pub(super) fn agrees(&self) -> bool {
        self.shown.read().unwrap_or_else(PoisonError::into_inner).problem.is_none()
    }

    pub(super) fn generation(&self) -> u64 {
        self.shown.read().unwrap_or_else(PoisonError::into_inner).generation
    }

    /// For `lacre status`.
    pub(super) fn status(&self) -> Value {
        let Shown { generation, advanced_at, .. } =
            self.shown.read().unwrap_or_else(PoisonError::into_inner).clone();
        json!({
            "device": self.parts.config.device,
            "generation": generation,
            "advanced_at": advanced_at.to_rfc3339(),
        })
    }
}

/// Advances the counter once a period, as long as there is an anchor. Looks oftener than that: when a period
/// ends is counted from the last step, whichever daemon made it and however often it was restarted since.
pub(super) async fn run(services: Arc<Services>, health: Arc<Health>) {
    let Some(anchor) = &services.anchor else { return };
    loop {
        tokio::time::sleep(anchor.parts.config.period.min(LOOK)).await;
        anchor.advance().await;
        health.refresh();
    }
}

/// Who takes a database as the present one, and why.
pub struct Acceptance {
    /// Names of persons; two different ones where the anchor is overridden.
    pub by: Vec<String>,
    /// Why, for the audit log.
    pub reason: String,
}

/// What [`accept`] did.
#[derive(Debug, serde::Serialize)]
pub struct Accepted {
    /// The generation that database and counter have now.
    pub generation: u64,
    /// What was overridden; `None` if there was no anchor, or if nothing had to be done.
    pub overridden: Option<String>,
    /// Whether anything was done.
    pub changed: bool,
}

/// Takes the database as it is for the present one: the first time, or although the anchor says that it is an
/// old one. To be called while no daemon runs. Repeatable.
///
/// # Errors
/// [`AnchorError::OnePerson`] where two are needed.
pub async fn accept(config: Config, acceptance: &Acceptance) -> Result<Accepted, RunError> {
    let services = Services::open_for_restore(config).await?;
    let done = match Parts::of(&services) {
        Some(parts) => try_accept(&services, &parts, acceptance).await,
        None => Err(StartError::from(AnchorError::NotAccepted).into()),
    };
    services.close().await;
    done
}

async fn try_accept(
    services: &Services,
    parts: &Parts,
    acceptance: &Acceptance,
) -> Result<Accepted, RunError> {
    let caller = Caller::system("anchor", parts.tenant.clone());
    let turn = parts.db.turn(TurnName::Anchor).await.map_err(|error| refused(error.into()))?;
    let turn = Arc::new(turn);
    let Some((overridden, counter)) = parts.to_accept(&acceptance.by, &turn).await.map_err(refused)? else {
        let generation = parts.check(&turn).await.map_err(refused)?.generation;
        return Ok(Accepted { generation, overridden: None, changed: false });
    };
    if overridden.is_some() {
        // Like any other restore: what would change the world by itself waits until somebody has looked.
        let quarantined = services.vault.quarantine(&caller, &BTreeSet::new()).await;
        quarantined.map_err(|error| RunError::Keys(ProvisionError::Vault(error)))?;
    }
    let generation = parts.take(acceptance, overridden.as_ref(), counter, &turn).await.map_err(refused)?;
    Ok(Accepted { generation, overridden: overridden.map(|error| error.to_string()), changed: true })
}

fn refused(error: AnchorError) -> RunError {
    StartError::from(error).into()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Checkpoint, Mark, Timestamp, Verdict, is_due, judge};

    #[test]
    fn a_database_is_the_present_one_an_old_one_or_of_another_counter() {
        for (known, counter, verdict) in [
            (None, None, Verdict::Never),
            (Some(7), Some(7), Verdict::Present),
            (Some(8), Some(7), Verdict::Finish),
            (Some(6), Some(7), Verdict::Older),
            (Some(1), Some(u64::MAX), Verdict::Older),
            // Anchored later than the copy was made.
            (None, Some(1), Verdict::Older),
            (Some(9), Some(7), Verdict::Replaced),
            (Some(1), Some(0), Verdict::Finish),
            (Some(7), None, Verdict::Replaced),
            (Some(0), Some(u64::MAX), Verdict::Older),
        ] {
            assert_eq!(judge(known, counter), verdict, "{known:?} {counter:?}");
        }
    }

    #[test]
    fn the_counter_goes_on_once_a_period_and_only_for_something_new() {
        let at = |seconds: i64| Timestamp::from_micros(seconds * 1_000_000);
        let mark = Mark { seq: 10, at: at(100), generation: 3, upto: Checkpoint::START, mac: vec![] };
        let head = |seq| Checkpoint { seq, ..Checkpoint::START };
        let minute = Duration::from_secs(60);
        for (seq, now, due) in [
            (11, 159, false),
            (11, 160, true),
            // Its own record is nothing new.
            (10, 1000, false),
            // The clock was put back.
            (11, 99, true),
        ] {
            assert_eq!(is_due(&mark, &head(seq), at(now), minute), due, "{seq} at {now}");
        }
    }
}
