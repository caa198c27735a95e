//! A fake identity provider (OAuth 2.0, OpenID Connect) on loopback, for what a real one cannot be made to do.
//!
//! It keeps the rules: codes work once and with their PKCE verifier, clients authenticate, refresh tokens rotate
//! and a second use is found out, in one of three [`Mode`]s. It counts what it is asked, and fails by script: each
//! [`Fault`] is for the next request at `/token`, and [`FakeIdp::pause`] stops one in the middle. Its tokens carry
//! the daemon's canary, so that the scan of a test finds them wherever they should not be.
//!
//! It has threads of its own: it answers while a test waits for a process.

#![allow(dead_code, reason = "each test program uses a part of it")]

#[path = "idp/grants.rs"]
mod grants;
#[path = "idp/wire.rs"]
mod wire;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use p256::ecdsa::SigningKey;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpSocket};
use tokio::runtime::Runtime;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use url::Url;

use grants::{Grant, Pending, State};
use wire::serve;

/// The one client that it knows.
pub const CLIENT: &str = "lacre-at-the-idp";

/// What its key is made of.
const KEY: [u8; 32] = [23; 32];

/// How long a test waits for a request before it says that none came.
const PATIENCE: Duration = Duration::from_secs(30);

/// What becomes of a refresh token that is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Another one takes its place. Used again, it ends the whole family (RFC 9700, section 4.14.2).
    Strict,
    /// The same, but for so long a second use has the same answer once more.
    Grace(Duration),
    /// It stays, and refresh answers have none.
    NonRotating,
}

/// A change of the answer that would have been given.
pub type Edit = Box<dyn FnOnce(&mut Value) + Send>;
/// The body that is sent in place of a JSON.
pub type Body = Box<dyn FnOnce(&Value) -> Vec<u8> + Send>;

/// What happens to a request at `/token`.
pub enum Fault {
    /// Answers so and does nothing: status, headers, body.
    Status(u16, Vec<(&'static str, String)>, String),
    /// Does nothing and never answers.
    Hang,
    /// Does what was asked and answers with the head only.
    HangAfterHeaders,
    /// Does nothing and closes.
    CloseBeforeAnswer,
    /// Does what was asked and closes after so many bytes of the answer.
    CloseAfter(usize),
    /// Does nothing for so long, and then what was asked.
    Delay(Duration),
    /// Leaves the refresh token as it is, and says it again or not at all.
    Keep { told: bool },
    /// Does what was asked and changes the JSON of the answer.
    Edit(Edit),
    /// Does what was asked and answers with this body, made of the JSON.
    Text(Body),
    /// Does nothing and sends these bytes, head and all.
    Raw(Vec<u8>),
    /// Does what was asked and answers as a query string.
    QueryString,
    /// Sends chunks without end.
    Endless,
    /// Sends one byte of a good answer each so often.
    Drip(Duration),
}

impl Fault {
    /// A status with an OAuth error.
    pub fn error(status: u16, error: &str) -> Self {
        Self::Status(status, vec![], json!({ "error": error }).to_string())
    }

    /// A bare status.
    pub const fn status(status: u16) -> Self {
        Self::Status(status, vec![], String::new())
    }

    /// An answer with another member.
    pub fn with(member: &'static str, value: Value) -> Self {
        Self::Edit(Box::new(move |answer| answer[member] = value))
    }

    /// An answer without a member.
    pub fn without(member: &'static str) -> Self {
        Self::Edit(Box::new(move |answer| drop(answer.as_object_mut().unwrap().remove(member))))
    }

    /// An answer with another member, whose value need not be JSON.
    pub fn with_raw(member: &'static str, raw: &str) -> Self {
        let raw = raw.to_owned();
        Self::Text(Box::new(move |answer| {
            let mut rest = answer.clone();
            rest.as_object_mut().unwrap().remove(member);
            let rest = rest.to_string();
            format!("{},\"{member}\":{raw}}}", rest.strip_suffix('}').unwrap()).into_bytes()
        }))
    }
}

/// Where a request can be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// It was read, and nothing was done.
    Received,
    /// Tokens were made and old ones ended, and nothing was sent.
    Decided,
    /// Half of the answer was sent.
    HalfSent,
    /// All of it was sent.
    Sent,
}

struct Hold {
    point: Point,
    reached: Notify,
    go: Notify,
    is_abandoned: AtomicBool,
}

impl Hold {
    /// `None` if the request is to end here.
    async fn at(hold: Option<&Arc<Self>>, point: Point) -> Option<()> {
        let Some(hold) = hold.filter(|hold| hold.point == point) else { return Some(()) };
        hold.reached.notify_one();
        hold.go.notified().await;
        (!hold.is_abandoned.load(Ordering::SeqCst)).then_some(())
    }
}

/// The provider; ends with the value.
pub struct FakeIdp {
    /// Its address and issuer.
    pub url: String,
    /// The client's secret.
    pub client_secret: String,
    address: SocketAddr,
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
    accepting: Mutex<Option<JoinHandle<()>>>,
    /// Holds the queue of connections full while it does not accept.
    full: Mutex<Option<(TcpListener, std::net::TcpStream)>>,
}

struct Shared {
    state: Mutex<State>,
    hold: Mutex<Option<Arc<Hold>>>,
    connections: AtomicUsize,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl FakeIdp {
    /// Starts it on a free port.
    pub fn start(mode: Mode, canary: &str) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let url = format!("http://{address}");
        let client_secret = format!("{canary}-of-the-client");
        let state = State::new(mode, canary, &url, &client_secret);
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            hold: Mutex::default(),
            connections: AtomicUsize::new(0),
        });
        let idp = Self {
            url,
            client_secret,
            address,
            shared,
            runtime: Some(runtime),
            accepting: Mutex::default(),
            full: Mutex::default(),
        };
        let _context = idp.runtime().enter();
        idp.accept(TcpListener::from_std(listener).unwrap());
        idp
    }

    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("until it is dropped")
    }

    fn accept(&self, listener: TcpListener) {
        let shared = Arc::clone(&self.shared);
        let task = self.runtime().spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                shared.connections.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(serve(stream, Arc::clone(&shared)));
            }
        });
        *self.accepting.lock().unwrap() = Some(task);
    }

    /// From now on connections are not made, nor refused: the kernel's queue is full.
    pub async fn stop_accepting(&self) {
        let task = self.accepting.lock().unwrap().take().expect("it accepts");
        task.abort();
        let _ = task.await;
        let context = self.runtime().enter();
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.address).unwrap();
        let listener = socket.listen(0).unwrap();
        drop(context);
        let first = std::net::TcpStream::connect(self.address).unwrap();
        *self.full.lock().unwrap() = Some((listener, first));
    }

    /// Takes connections again, also those that waited.
    pub fn accept_again(&self) {
        let (listener, first) = self.full.lock().unwrap().take().expect("it had stopped");
        drop(first);
        self.accept(listener);
    }

    /// A code for `subject`, as if somebody had signed in and agreed to `scope`: for whoever brings it.
    pub fn code(&self, subject: &str, scope: &str) -> String {
        let grant = Grant { subject: subject.to_owned(), scope: scope.to_owned(), nonce: None };
        self.shared.state().keep_code(Pending { grant, asked: None })
    }

    /// What the browser brings back from `authorization_uri`, with `subject` signed in: code and state.
    pub fn authorize(&self, authorization_uri: &str, subject: &str) -> (String, String) {
        let uri = Url::parse(authorization_uri).unwrap();
        assert_eq!(format!("{}/auth", self.url), uri.as_str().split('?').next().unwrap(), "another provider");
        let query: HashMap<String, String> = uri.query_pairs().into_owned().collect();
        let asked = |name: &str| query.get(name).cloned();
        assert_eq!(asked("client_id").as_deref(), Some(CLIENT), "{uri}");
        assert_eq!(asked("response_type").as_deref(), Some("code"), "{uri}");
        if query.contains_key("code_challenge") {
            assert_eq!(asked("code_challenge_method").as_deref(), Some("S256"), "{uri}");
        }
        let grant = Grant {
            subject: subject.to_owned(),
            scope: asked("scope").unwrap_or_default(),
            nonce: asked("nonce"),
        };
        let bound = (asked("redirect_uri"), asked("code_challenge"));
        let code = self.shared.state().keep_code(Pending { grant, asked: Some(bound) });
        (code, asked("state").expect("a state"))
    }

    /// The next requests at `/token` have these faults, one each.
    pub fn script(&self, faults: impl IntoIterator<Item = Fault>) {
        self.shared.state().faults.extend(faults);
    }

    /// Faults that did not come to pass are forgotten; their number.
    pub fn forget_faults(&self) -> usize {
        std::mem::take(&mut self.shared.state().faults).len()
    }

    /// What answers say of how long a token lives.
    pub fn set_expires_in(&self, seconds: u64) {
        self.shared.state().expires_in = seconds;
    }

    /// Whether there are refresh tokens at all.
    pub fn set_offline(&self, is_offline: bool) {
        self.shared.state().is_offline = is_offline;
    }

    /// Every request at `/token` takes so long.
    pub fn set_pace(&self, time: Duration) {
        self.shared.state().pace = time;
    }

    /// The metadata have that member, instead of their own.
    pub fn say(&self, member: &str, value: Value) {
        self.shared.state().said.insert(member.to_owned(), value);
    }

    /// The metadata are its own again.
    pub fn say_the_truth(&self) {
        self.shared.state().said.clear();
    }

    /// The key that ID tokens are signed with.
    pub fn key(&self) -> Value {
        self.shared.state().jwks()["keys"][0].clone()
    }

    /// The document at `/jwks` has these keys, or those that are true.
    pub fn set_keys(&self, keys: Option<Value>) {
        self.shared.state().keys = keys.map(|keys| json!({ "keys": keys }));
    }

    /// The next request at `/token` stops when its tokens are made and nothing was sent.
    pub fn pause_before_answer(&self) {
        self.pause(Point::Decided);
    }

    /// The next request at `/token` stops at that point.
    pub fn pause(&self, point: Point) {
        let hold =
            Hold { point, reached: Notify::new(), go: Notify::new(), is_abandoned: AtomicBool::new(false) };
        self.shared.state().hold_next = true;
        *self.shared.hold.lock().unwrap() = Some(Arc::new(hold));
    }

    fn hold(&self) -> Arc<Hold> {
        Arc::clone(self.shared.hold.lock().unwrap().as_ref().expect("a pause"))
    }

    /// Waits until a request has stopped where it should.
    pub async fn wait_for_request(&self) {
        let hold = self.hold();
        let reached = tokio::time::timeout(PATIENCE, hold.reached.notified()).await;
        assert!(reached.is_ok(), "no request came to {:?}", hold.point);
    }

    /// The stopped request goes on.
    pub fn release(&self) {
        self.hold().go.notify_one();
    }

    /// The stopped request ends where it is.
    pub fn abandon(&self) {
        let hold = self.hold();
        hold.is_abandoned.store(true, Ordering::SeqCst);
        hold.go.notify_one();
    }

    /// Requests at `/token` of that grant type.
    pub fn requests(&self, grant_type: &str) -> usize {
        self.shared.state().requests.get(grant_type).copied().unwrap_or(0)
    }

    /// Refresh requests.
    pub fn refreshes(&self) -> usize {
        self.requests("refresh_token")
    }

    /// How often the refresh token was used that was used most often.
    pub fn most_uses(&self) -> usize {
        self.shared.state().uses.values().copied().max().unwrap_or(0)
    }

    /// How many refresh tokens were used.
    pub fn tokens_used(&self) -> usize {
        self.shared.state().uses.len()
    }

    /// Families that ended because a refresh token was used twice.
    pub fn families_revoked(&self) -> usize {
        self.shared.state().reused.len()
    }

    /// Whose refresh tokens were used, in that order.
    pub fn refreshed(&self) -> Vec<String> {
        self.shared.state().order.clone()
    }

    /// The most requests at `/token` that there were at once.
    pub fn most_at_once(&self) -> usize {
        self.shared.state().most_open
    }

    /// Requests at `/token` by a client that authenticated in the header.
    pub fn by_header(&self) -> usize {
        self.shared.state().by_header
    }

    /// How often the document at that path was fetched.
    pub fn fetched(&self, path: &str) -> usize {
        self.shared.state().fetched.get(path).copied().unwrap_or(0)
    }

    /// Tokens that the client has revoked (RFC 7009).
    pub fn revocations(&self) -> Vec<String> {
        self.shared.state().revocations.clone()
    }

    /// Connections that were ever made.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// Whether it gave out that access token and stands by it.
    pub fn is_live(&self, access_token: &str) -> bool {
        self.shared.state().live_grant(access_token).is_some()
    }

    /// Whose access token that is.
    pub fn subject_of(&self, access_token: &str) -> Option<String> {
        self.shared.state().live_grant(access_token).map(|grant| grant.subject.clone())
    }

    /// The access tokens of a subject by which the provider stands.
    pub fn live_tokens_of(&self, subject: &str) -> Vec<String> {
        let state = self.shared.state();
        let is_live = |token: &&String| state.live_grant(token).is_some_and(|grant| grant.subject == subject);
        state.access.keys().filter(is_live).cloned().collect()
    }

    /// Ends every family, as a user does who takes back what was granted.
    pub fn revoke_everything(&self) {
        let mut state = self.shared.state();
        state.ended = (0..=state.serial).collect();
    }
}

/// An ID token with that header and those claims, by the provider's key or by another one.
pub fn id_token(header: &Value, claims: &Value, is_genuine: bool) -> String {
    let key = if is_genuine { KEY } else { [42; 32] };
    grants::signed(&SigningKey::from_slice(&key).unwrap(), header, claims)
}

impl Drop for FakeIdp {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
