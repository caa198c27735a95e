//! Tells systemd how the daemon is. Without systemd nothing happens.

use std::time::Duration;

use sd_notify::NotifyState;

/// The daemon serves. Not the same as ready: a device that is away must not make systemd restart
/// the process, because every restart is a PIN try.
pub(super) fn started() {
    tell(&[NotifyState::Ready, NotifyState::Status("serving")]);
}

pub(super) fn ready() {
    tell(&[NotifyState::Status("ready")]);
}

pub(super) fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Shows a sign of life as long as the runtime turns, if systemd asked for it.
pub(super) async fn watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    loop {
        tell(&[NotifyState::Watchdog]);
        tokio::time::sleep((limit / 2).max(Duration::from_millis(100))).await;
    }
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "systemd was not told");
    }
}
