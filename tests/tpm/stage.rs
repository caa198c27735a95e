//! A device in this process on a TPM of its own.

use std::ops::Deref;
use std::time::{Duration, Instant};

use lacre::seal::guarded::Options;
use lacre::seal::{
    Arena, Context, Device, DeviceConfig, DeviceState, Kek, KekId, KeyRef, KeySpec, SealError, Sealed,
};
use serde_json::json;

use crate::swtpm::Swtpm;

/// A place for a value.
pub const HERE: Context<'_> = Context { tenant: "t", kind: "secret", record: "r1", version: 1 };

/// A started device; closed when dropped.
pub struct Running(Device);

impl Running {
    /// On that TPM, ready or not.
    pub fn on(tpm: &Swtpm) -> Self {
        Self::at(&tpm.tcti(), tpm)
    }

    /// On a TPM that is reached in another way.
    pub fn at(tcti: &str, tpm: &Swtpm) -> Self {
        let config = json!({
            "latch_dir": tpm.dir().join("latch"),
            "deadline": 5,
            "tpm": { "tcti": tcti, "auth_source": format!("file:{}", tpm.auth_file.display()) },
        });
        Self::with(&serde_json::from_value(config).unwrap())
    }

    /// As configured.
    pub fn with(config: &DeviceConfig) -> Self {
        let arena = Arena::new(&Options { slots: 64, allow_unlocked: true, ..Options::default() }).unwrap();
        Self(lacre::seal::start(config, &arena).unwrap())
    }

    /// Ready.
    pub fn ready_on(tpm: &Swtpm) -> Self {
        let running = Self::on(tpm);
        assert_eq!(running.status().state, DeviceState::Ready);
        running
    }

    pub async fn kek(&self) -> Kek {
        let key = self.key(KeySpec::Kek).await;
        Kek { id: KekId::generate().unwrap(), version: 1, key }
    }

    pub async fn key(&self, spec: KeySpec) -> KeyRef {
        self.admin.generate(&KeyRef::plan(spec).unwrap()).await.unwrap()
    }

    pub async fn opens(&self, kek: &Kek, sealed: &Sealed, value: &[u8]) {
        let opened = self.sealer.open(kek, &HERE, sealed).await.unwrap();
        assert!(opened.with(|bytes| bytes == value));
    }

    /// Waits until the device is ready; how long it took.
    pub async fn ready(&self, patience: Duration) -> Duration {
        let began = Instant::now();
        while self.status().state != DeviceState::Ready {
            assert!(began.elapsed() < patience, "not ready: {:?}", self.status());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        began.elapsed()
    }

    /// Asks until the device is known to be away.
    pub async fn away(&self, kek: &Kek) -> DeviceState {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let answer = self.sealer.seal(kek, &HERE, b"probe").await;
            if matches!(answer, Err(SealError::Unavailable { .. }))
                && self.status().state != DeviceState::Ready
            {
                return self.status().state;
            }
            assert!(Instant::now() < until, "still ready");
        }
    }
}

impl Deref for Running {
    type Target = Device;

    fn deref(&self) -> &Device {
        &self.0
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.close();
    }
}
