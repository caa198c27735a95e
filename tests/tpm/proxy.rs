//! A wire before the TPM that can be listened to and disturbed. The TCTI opens a connection per command.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::swtpm::Swtpm;

/// What is done to an answer.
pub type Alter = fn(&mut [u8]);

/// What happens to the TPM's answers.
#[derive(Clone, Copy, Debug)]
pub enum Wire {
    /// Nothing.
    Clean,
    /// They come late.
    Late(Duration),
    /// The connection ends after so many bytes of each.
    Cut(usize),
    /// Other bytes come in their place.
    Garbage,
    /// Their header promises more than there is.
    TooLong,
    /// Those to one command are altered, as by a chip that computes wrongly.
    Altered(u32, Alter),
}

/// Where a command is lost, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// On its way to the TPM.
    Before(u32),
    /// After the TPM has done it: its answer is lost.
    After(u32),
}

struct State {
    tpm: u16,
    wire: Mutex<Wire>,
    trap: Mutex<Option<Trap>>,
    is_sprung: AtomicBool,
    /// Answers to let pass, and what happens to the one after them.
    spoiled: Mutex<Option<(usize, Alter)>>,
    seen: Mutex<Vec<u8>>,
    ended: AtomicBool,
}

impl State {
    /// The trap of this command, which is sprung.
    fn trap_for(&self, code: Option<u32>) -> Option<Trap> {
        let trap = self.trap.lock().unwrap().take_if(|trap| {
            let (Trap::Before(lost) | Trap::After(lost)) = *trap;
            code == Some(lost)
        });
        if matches!(trap, Some(Trap::Before(_))) {
            self.is_sprung.store(true, Ordering::SeqCst);
        }
        trap
    }

    /// Alters the answer if it is its turn.
    fn spoil(&self, bytes: &mut [u8]) {
        let mut spoiled = self.spoiled.lock().unwrap();
        *spoiled = match spoiled.take() {
            Some((0, how)) => {
                how(bytes);
                None
            }
            Some((after, how)) => Some((after - 1, how)),
            None => None,
        };
    }
}

/// A proxy on two ports, as swtpm has them.
pub struct Proxy {
    /// The server's port; the control channel is the next one.
    pub port: u16,
    state: Arc<State>,
}

impl Proxy {
    pub fn before(tpm: &Swtpm) -> Self {
        let state = State {
            tpm: tpm.port,
            wire: Mutex::new(Wire::Clean),
            trap: Mutex::default(),
            is_sprung: AtomicBool::new(false),
            spoiled: Mutex::default(),
            seen: Mutex::default(),
            ended: AtomicBool::new(false),
        };
        let state = Arc::new(state);
        loop {
            let server = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = server.local_addr().unwrap().port();
            let Ok(control) = TcpListener::bind(("127.0.0.1", port.wrapping_add(1))) else { continue };
            for (listener, plus) in [(server, 0), (control, 1)] {
                let state = Arc::clone(&state);
                std::thread::spawn(move || {
                    for client in listener.incoming() {
                        if state.ended.load(Ordering::Relaxed) {
                            return;
                        }
                        let (client, state) = (client.unwrap(), Arc::clone(&state));
                        std::thread::spawn(move || serve(&client, &state, plus));
                    }
                });
            }
            return Self { port, state };
        }
    }

    pub fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.port)
    }

    pub fn set(&self, wire: Wire) {
        *self.state.wire.lock().unwrap() = wire;
    }

    /// Loses one command.
    pub fn lose(&self, trap: Trap) {
        self.state.is_sprung.store(false, Ordering::SeqCst);
        *self.state.trap.lock().unwrap() = Some(trap);
    }

    /// Whether it was lost.
    pub fn has_lost(&self) -> bool {
        self.state.is_sprung.load(Ordering::SeqCst)
    }

    /// Alters one answer, after that many others.
    pub fn spoil(&self, after: usize, how: Alter) {
        *self.state.spoiled.lock().unwrap() = Some((after, how));
    }

    /// Alters none any more; whether one was.
    pub fn has_spoiled(&self) -> bool {
        self.state.spoiled.lock().unwrap().take().is_none()
    }

    /// Everything that has passed, in both directions.
    pub fn seen(&self) -> Vec<u8> {
        self.state.seen.lock().unwrap().clone()
    }
}

impl Proxy {
    /// How often that command has been sent.
    pub fn count(&self, command: u32) -> usize {
        let code = command.to_be_bytes();
        // The header is a tag, the length and the code. A command of at most 4 KiB has two zeros before the code.
        self.seen()
            .windows(10)
            .filter(|at| at[0] == 0x80 && at[1] <= 2 && at[2..4] == [0; 2] && at[6..] == code)
            .count()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::Relaxed);
        for plus in 0..2 {
            let _ = TcpStream::connect(("127.0.0.1", self.port + plus));
        }
    }
}

fn serve(client: &TcpStream, state: &Arc<State>, plus: u16) {
    let Ok(tpm) = TcpStream::connect(("127.0.0.1", state.tpm + plus)) else {
        let _ = client.shutdown(Shutdown::Both);
        return;
    };
    let (from, to, there) = (client.try_clone().unwrap(), tpm.try_clone().unwrap(), Arc::clone(state));
    let withheld = Arc::new(AtomicBool::new(false));
    let withhold = Arc::clone(&withheld);
    let command = Arc::new(AtomicU32::new(0));
    let asked = Arc::clone(&command);
    std::thread::spawn(move || {
        copy(from, to, &mut |bytes, to| {
            there.seen.lock().unwrap().extend_from_slice(bytes);
            // Tag and length come before the command code (part 1, section 18.3).
            let code = bytes.get(6..10).map(|code| u32::from_be_bytes(code.try_into().unwrap()));
            if let Some(code) = code {
                asked.store(code, Ordering::Relaxed);
            }
            match there.trap_for(code.filter(|_| plus == 0)) {
                Some(Trap::Before(_)) => return Err(std::io::ErrorKind::ConnectionReset.into()),
                Some(Trap::After(_)) => withhold.store(true, Ordering::SeqCst),
                None => {}
            }
            to.write_all(bytes)
        });
    });
    copy(tpm, client.try_clone().unwrap(), &mut |bytes, to| {
        state.seen.lock().unwrap().extend_from_slice(bytes);
        if plus == 1 {
            return to.write_all(bytes);
        }
        if withheld.load(Ordering::SeqCst) {
            // Only now: the TPM has done it.
            state.is_sprung.store(true, Ordering::SeqCst);
            return Err(std::io::ErrorKind::ConnectionReset.into());
        }
        let mut bytes = bytes.to_vec();
        state.spoil(&mut bytes);
        match *state.wire.lock().unwrap() {
            Wire::Clean => to.write_all(&bytes),
            Wire::Late(time) => {
                std::thread::sleep(time);
                to.write_all(&bytes)
            }
            Wire::Cut(len) => {
                to.write_all(&bytes[..len.min(bytes.len())])?;
                Err(std::io::ErrorKind::ConnectionReset.into())
            }
            Wire::Garbage => to.write_all(&bytes.iter().map(|byte| byte ^ 0xA5).collect::<Vec<_>>()),
            Wire::TooLong => {
                bytes[2..6].copy_from_slice(&0x00FF_FFFF_u32.to_be_bytes());
                to.write_all(&bytes)?;
                Err(std::io::ErrorKind::ConnectionReset.into())
            }
            Wire::Altered(code, how) => {
                if command.load(Ordering::Relaxed) == code {
                    how(&mut bytes);
                }
                to.write_all(&bytes)
            }
        }
    });
}

fn copy(
    mut from: TcpStream,
    mut to: TcpStream,
    pass: &mut dyn FnMut(&[u8], &mut TcpStream) -> std::io::Result<()>,
) {
    let mut bytes = [0; 8192];
    while let Ok(read) = from.read(&mut bytes) {
        if read == 0 || pass(&bytes[..read], &mut to).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
