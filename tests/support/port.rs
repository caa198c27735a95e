//! Ports for daemons whose address must be known before they start.

use std::net::TcpListener;

/// A port that was free a moment ago and that the kernel gives to nobody by itself: below the range of
/// outgoing connections (`ip_local_port_range` begins at 32768), so that it is still free after a restart.
pub fn free_port() -> u16 {
    loop {
        let port = 10_000 + u16::try_from(getrandom::u32().unwrap() % 22_000).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
