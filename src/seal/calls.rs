//! What the lanes are asked for, one method for each kind of request: which lane, which priority, whose turn.

use std::time::{Duration, Instant};

use tokio::sync::SemaphorePermit;
use zeroize::Zeroizing;

use crate::seal::driver::Count;
use crate::seal::gate::REPEATED;
use crate::seal::guarded::{Dek, Lent, SecretBuf};
use crate::seal::key::{Alg, Kek, KeyRef, PublicKey, Signature, WrappedDek};
use crate::seal::queue::Priority;
use crate::seal::request::{Answer, Request};
use crate::seal::worker::{Held, Lanes, full, mismatch};
use crate::seal::{KeyReport, SealError};

impl Lanes {
    /// Fills `dek` with a fresh key and wraps it.
    pub(crate) async fn wrap(
        &self,
        kek: &Kek,
        dek: SecretBuf,
        aad: Vec<u8>,
        flow: u64,
    ) -> Result<(WrappedDek, SecretBuf), SealError> {
        let request = Request::Wrap { kek: kek.key.clone(), dek, aad };
        match self.ask(self.lane_of(&kek.key), Priority::Foreground, flow, request, "wrap").await? {
            Answer::Wrapped(wrapped, dek) => Ok((wrapped, dek)),
            _ => Err(mismatch("wrap")),
        }
    }

    /// A place for a DEK that is to come from another device. Taken before that one unwraps it: otherwise DEKs
    /// would expire in the queue behind each other. Given up after the deadline.
    pub(crate) async fn arrival(&self, kek: &KeyRef) -> Result<SemaphorePermit<'_>, SealError> {
        self.breaker.admit()?;
        let place = self.lane_of(kek).arrivals.acquire();
        let place = tokio::time::timeout(self.deadline, place).await;
        place.ok().and_then(Result::ok).ok_or_else(full)
    }

    /// Wraps a DEK that another device has unwrapped, in the background. `None` if `lifetime` ended before the
    /// call began: the DEK is wiped then. A call that has begun is waited for like any other.
    pub(crate) async fn wrap_within(
        &self,
        lifetime: Duration,
        kek: &Kek,
        dek: SecretBuf,
        aad: Vec<u8>,
        flow: u64,
    ) -> Result<Option<WrappedDek>, SealError> {
        let until = Instant::now() + lifetime;
        let dek = Lent::new(Dek::new(dek, lifetime));
        let request = Request::WrapLent { kek: kek.key.clone(), dek: dek.share(), aad };
        let answer = self.ask(self.lane_of(&kek.key), Priority::Background, flow, request, "wrap");
        let mut answer = std::pin::pin!(answer);
        let answer = tokio::select! {
            answer = &mut answer => answer?,
            () = tokio::time::sleep_until(until.into()) => {
                if dek.take_away() {
                    return Ok(None);
                }
                answer.await?
            }
        };
        match answer {
            Answer::Rewrapped(wrapped) => Ok(Some(wrapped)),
            Answer::Expired => Ok(None),
            _ => Err(mismatch("wrap")),
        }
    }

    /// Unwraps under one KEK and wraps under another of this device, in the background and in one job.
    pub(crate) async fn rewrap(
        &self,
        (from, wrapped, old): (&Kek, WrappedDek, Vec<u8>),
        (to, new): (&Kek, Vec<u8>),
        room: SecretBuf,
        flow: u64,
    ) -> Result<WrappedDek, SealError> {
        let lane = if from.key.is_slow() { &self.slow } else { self.lane_of(&to.key) };
        let (from, to) = (from.key.clone(), to.key.clone());
        let request = Request::Rewrap { from, to, wrapped, aads: (old, new), room, is_open: false };
        match self.ask(lane, Priority::Background, flow, request, "rewrap").await? {
            Answer::Rewrapped(wrapped) => Ok(wrapped),
            _ => Err(mismatch("rewrap")),
        }
    }

    pub(crate) async fn unwrap(
        &self,
        kek: &Kek,
        wrapped: WrappedDek,
        aad: Vec<u8>,
        out: SecretBuf,
        (priority, flow): (Priority, u64),
    ) -> Result<SecretBuf, SealError> {
        let request = Request::Unwrap { kek: kek.key.clone(), wrapped, aad, out };
        match self.ask(self.lane_of(&kek.key), priority, flow, request, "unwrap").await? {
            Answer::Dek(dek) => Ok(dek),
            _ => Err(mismatch("unwrap")),
        }
    }

    pub(crate) async fn sign(&self, key: &KeyRef, alg: Alg, digest: Vec<u8>) -> Result<Signature, SealError> {
        if !alg.fits(key.spec) {
            return Err(mismatch("sign"));
        }
        if self.gate.admit(key).is_err() {
            return Err(self.suspended(key));
        }
        let request = Request::Sign { key: key.clone(), alg, digest: digest.clone() };
        match self.ask(self.lane_of(key), Priority::Foreground, key.flow(), request, "sign").await? {
            Answer::Signature(signature) => self.release(key, (alg, &digest), signature).await,
            _ => Err(mismatch("sign")),
        }
    }

    pub(crate) async fn mac(&self, key: &KeyRef, message: &[u8]) -> Result<[u8; 32], SealError> {
        let request = Request::Mac { key: key.clone(), message: Zeroizing::new(message.to_vec()) };
        match self.ask(&self.fast, Priority::Foreground, key.flow(), request, "mac").await? {
            Answer::Mac(mac) => Ok(mac),
            _ => Err(mismatch("mac")),
        }
    }

    pub(crate) async fn public_key(&self, key: &KeyRef) -> Result<PublicKey, SealError> {
        let request = Request::PublicKey { key: key.clone() };
        match self.ask(&self.fast, Priority::Foreground, 0, request, "public_key").await? {
            Answer::PublicKey(key) => Ok(key),
            _ => Err(mismatch("public_key")),
        }
    }

    /// Makes the planned key, or takes it from outside.
    pub(crate) async fn generate(
        &self,
        planned: &KeyRef,
        given: Option<SecretBuf>,
        held: Held,
    ) -> Result<KeyRef, SealError> {
        let request = Request::Generate { planned: planned.clone(), given };
        let (turn, operation) = ((Priority::Foreground, 0), request.name());
        match self.ask_holding(&self.admin, turn, request, operation, held).await? {
            Answer::Generated(key) => Ok(key),
            _ => Err(mismatch(operation)),
        }
    }

    pub(crate) async fn list(&self) -> Result<Vec<KeyRef>, SealError> {
        match self.administer(Request::List, "list").await? {
            Answer::Listed(keys) => Ok(keys.into_iter().map(|key| key.on(self.device.clone())).collect()),
            _ => Err(mismatch("list")),
        }
    }

    pub(crate) async fn destroy(&self, key: &KeyRef) -> Result<(), SealError> {
        match self.administer(Request::Destroy { key: key.clone() }, "destroy").await? {
            Answer::Destroyed => {
                self.gate.forget(key.id);
                Ok(())
            }
            _ => Err(mismatch("destroy")),
        }
    }

    pub(crate) async fn inspect(&self, key: &KeyRef) -> Result<KeyReport, SealError> {
        match self.administer(Request::Inspect { key: key.clone() }, "inspect").await? {
            Answer::Report(mut report) => {
                if self.gate.admit(key).is_err() {
                    report.deviations.push(REPEATED.to_owned());
                }
                Ok(report)
            }
            _ => Err(mismatch("inspect")),
        }
    }

    pub(crate) async fn capabilities(&self) -> Result<serde_json::Value, SealError> {
        match self.administer(Request::Capabilities, "capabilities").await? {
            Answer::Capabilities(report) => Ok(report),
            _ => Err(mismatch("capabilities")),
        }
    }

    pub(crate) async fn count(&self, count: Count, held: Held) -> Result<Option<u64>, SealError> {
        let turn = (Priority::Foreground, 0);
        match self.ask_holding(&self.admin, turn, Request::Count(count), "count", held).await? {
            Answer::Counted(value) => Ok(value),
            _ => Err(mismatch("count")),
        }
    }

    async fn administer(&self, request: Request, operation: &'static str) -> Result<Answer, SealError> {
        self.ask(&self.admin, Priority::Foreground, 0, request, operation).await
    }
}
