//! TP-8 and CB-6: a counter in the TPM tells an old copy of the database from the present one.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use diesel::{Connection, QueryableByName, RunQueryDsl, SqliteConnection, sql_query, sql_types};
use rustix::process::Signal;
use serde_json::Value;

use crate::proxy::{Proxy, Trap};
use crate::swtpm::{Swtpm, program};

/// `TPM2_CC_NV_Increment` (part 2, section 6.5.2).
const NV_INCREMENT: u32 = 0x0000_0134;
const BY_TWO: [&str; 6] = ["--by", "ana", "--by", "rui", "--reason", "a drill"];

#[derive(QueryableByName)]
struct Row {
    #[diesel(sql_type = sql_types::BigInt)]
    seq: i64,
    #[diesel(sql_type = sql_types::Text)]
    body: String,
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// An initialised installation with an anchor, which nobody has accepted yet.
struct Installation {
    dir: tempfile::TempDir,
}

/// A daemon that is killed with the value.
struct Serving(Child);

impl Serving {
    fn signal(&mut self, signal: Signal) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.0.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
        let status = self.0.wait().unwrap();
        assert!(signal == Signal::KILL || status.success(), "{status}");
    }

    fn stop(mut self) {
        self.signal(Signal::TERM);
    }

    fn kill(mut self) {
        self.signal(Signal::KILL);
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Installation {
    fn new(tcti: &str, tpm: &Swtpm, period: &str) -> Self {
        let this = Self { dir: tempfile::tempdir().unwrap() };
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = format!(
            "data_dir = \"{dir}\"\n[server]\nlisten = \"127.0.0.1:{port}\"\nunix_socket = \"{dir}/socket\"\n\
             [[server.local_users]]\nuid = {uid}\nscopes = [\"secrets:metadata\", \"secrets:read\", \"secrets:write\"]\n\
             [memory]\nallow_unlocked = true\n[anchor]\nperiod = \"{period}\"\n\
             [seal]\ndeadline = \"5s\"\n[seal.tpm]\ntcti = \"{tcti}\"\nauth_source = \"file:{auth}\"\n",
            dir = this.dir.path().display(),
            uid = rustix::process::getuid().as_raw(),
            auth = tpm.auth_file.display(),
        );
        fs::write(this.config(), config).unwrap();
        let secret = this.dir.path().join("client-secret");
        this.run(&["init", "--secret-out", secret.to_str().unwrap()]);
        this
    }

    fn config(&self) -> PathBuf {
        self.dir.path().join("lacre.toml")
    }

    fn database(&self) -> PathBuf {
        self.dir.path().join("lacre.db")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = program(env!("CARGO_BIN_EXE_lacre"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("LACRE")) {
            command.env_remove(name);
        }
        command.current_dir(self.dir.path()).arg("--config").arg(self.config()).args(args);
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        let output = self.command(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}{}", text(&output.stdout), text(&output.stderr));
        output
    }

    /// What `lacre anchor accept` says.
    fn accept(&self, args: &[&str]) -> Result<Value, String> {
        let all = [&["-o", "json", "anchor", "accept"], args].concat();
        let output = self.command(&all).output().unwrap();
        match output.status.success() {
            true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
            false => Err(text(&output.stderr)),
        }
    }

    /// A daemon that is ready.
    fn serve(&self) -> Serving {
        self.try_serve().unwrap_or_else(|log| panic!("it did not start: {log}"))
    }

    /// A daemon that is ready, or why there is none.
    fn try_serve(&self) -> Result<Serving, String> {
        let mut process =
            self.command(&["serve"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = process.stderr.take().unwrap();
        let log = std::thread::spawn(move || {
            let mut log = String::new();
            let _ = stderr.read_to_string(&mut log);
            log
        });
        let mut line = String::new();
        BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let serving = Serving(process);
        match line.starts_with("lacre ready") {
            true => Ok(serving),
            false => {
                drop(serving);
                Err(log.join().unwrap())
            }
        }
    }

    /// Why there is no daemon.
    fn refusal(&self) -> String {
        match self.try_serve() {
            Ok(_) => panic!("the daemon serves"),
            Err(log) => log,
        }
    }

    /// One line of `lacre secrets` with the daemon.
    fn secrets(&self, args: &[&str], input: &str) -> String {
        let address = format!("unix://{}/socket", self.dir.path().display());
        let mut command = self.command(&[&["--addr", &address, "-o", "json", "secrets"], args].concat());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    fn status(&self) -> Value {
        let address = format!("unix://{}/socket", self.dir.path().display());
        let output = self.run(&["--addr", &address, "-o", "json", "status"]);
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn generation(&self) -> u64 {
        self.status()["status"]["anchor"]["generation"].as_u64().unwrap()
    }

    /// Waits until the daemon has gone on from this generation.
    fn advanced_from(&self, generation: u64) -> u64 {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let now = self.generation();
            if now > generation {
                return now;
            }
            assert!(Instant::now() < until, "still at {now}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A copy of the stopped daemon's database.
    fn copy(&self, to: &str) -> PathBuf {
        let copy = self.dir.path().join(to);
        fs::copy(self.database(), &copy).unwrap();
        copy
    }

    /// Puts a copy into the database's place.
    fn put_back(&self, copy: &Path) {
        for end in ["-wal", "-shm"] {
            let _ = fs::remove_file(format!("{}{end}", self.database().display()));
        }
        fs::copy(copy, self.database()).unwrap();
    }

    fn sql(&self, statements: &str) {
        SqliteConnection::establish(self.database().to_str().unwrap())
            .unwrap()
            .batch_execute(statements)
            .unwrap();
    }

    /// The last record of the anchor: its number and its line.
    fn mark(&self) -> (i64, String) {
        let mut database = SqliteConnection::establish(self.database().to_str().unwrap()).unwrap();
        let query =
            "SELECT seq, body FROM audit_records WHERE action LIKE 'anchor.%' ORDER BY seq DESC LIMIT 1";
        let row: Row = sql_query(query).get_result(&mut database).unwrap();
        (row.seq, row.body)
    }

    /// The generation that the database knows.
    fn known(&self) -> u64 {
        let body: Value = serde_json::from_str(&self.mark().1).unwrap();
        body["details"]["generation"].as_str().unwrap().parse().unwrap()
    }
}

/// Where the counter is.
fn index(tpm: &Swtpm) -> String {
    let indices = tpm.tool(&["tpm2_getcap", "handles-nv-index"]);
    let all = indices.lines().filter_map(|line| line.trim().strip_prefix("- "));
    let counters: Vec<_> =
        all.filter(|index| tpm.tool(&["tpm2_nvreadpublic", index]).contains("nt=0x1")).collect();
    assert_eq!(counters.len(), 1);
    counters[0].to_owned()
}

/// The counter, read by other people's tools.
fn counter(tpm: &Swtpm) -> u64 {
    // Sessions of a daemon that was killed; the tools do not make room as Lacre does.
    tpm.tool(&["tpm2_flushcontext", "-l"]);
    tpm.tool(&["tpm2_nvread", &index(tpm), "-C", "o", "-s", "8", "--output", "counter"]);
    u64::from_be_bytes(fs::read(tpm.dir().join("counter")).unwrap().try_into().unwrap())
}

/// TP-8, CB-6.
#[test]
fn a_database_that_is_older_than_its_anchor_is_not_served() {
    let tpm = Swtpm::new();
    let lacre = Installation::new(&tpm.tcti(), &tpm, "1s");
    let refused = lacre.refusal();
    assert!(refused.contains("lacre anchor accept"), "{refused}");

    let accepted = lacre.accept(&["--by", "ana", "--reason", "new"]).unwrap();
    assert_eq!((&accepted["changed"], &accepted["overridden"]), (&true.into(), &Value::Null));
    assert_eq!(accepted["generation"], counter(&tpm));
    let again = lacre.accept(&["--by", "ana", "--reason", "new"]).unwrap();
    assert_eq!((&again["changed"], &again["generation"]), (&false.into(), &accepted["generation"]));

    let serving = lacre.serve();
    let first = lacre.generation();
    lacre.secrets(&["create", "kept", "--kind", "opaque"], "kept");
    lacre.advanced_from(first);
    serving.stop();
    let old = lacre.copy("old.db");

    let serving = lacre.serve();
    let before = lacre.generation();
    lacre.secrets(&["create", "later", "--kind", "opaque"], "later");
    lacre.secrets(&["delete", "kept", "--yes"], "");
    lacre.advanced_from(before);
    serving.stop();
    let (present, at) = (lacre.copy("present.db"), counter(&tpm));
    assert_eq!(lacre.known(), at);
    let (_, genuine) = lacre.mark();

    lacre.put_back(&old);
    let refused = lacre.refusal();
    let known = lacre.known();
    assert!(known < at);
    let wanted = format!("knows generation {known}, and the counter of the device `default` is at {at}");
    assert!(refused.contains("older than its anchor") && refused.contains(&wanted), "{refused}");

    // A number that was written into the old copy, and the present database's own record.
    let (seq, line) = lacre.mark();
    let forged = line.replace(&format!("\"generation\":\"{known}\""), &format!("\"generation\":\"{at}\""));
    assert_ne!(forged, line);
    for (line, reason) in [(forged, "its MAC is another one"), (genuine, "the audit log up to it is")] {
        lacre.put_back(&old);
        lacre.sql(&format!("UPDATE audit_records SET body = '{line}' WHERE seq = {seq}"));
        let refused = lacre.refusal();
        assert!(refused.contains("is not genuine") && refused.contains(reason), "{refused}");
    }
    // No anchor at all is no way around it.
    lacre.put_back(&old);
    lacre.sql("UPDATE audit_records SET action = 'x' WHERE action LIKE 'anchor.%'");
    let refused = lacre.refusal();
    assert!(refused.contains("knows generation none"), "{refused}");

    // Two persons put it back on purpose.
    lacre.put_back(&old);
    for one in [&["--by", "ana", "--reason", "x"][..], &["--by", "ana", "--by", "ana", "--reason", "x"]] {
        let refused = lacre.accept(one).unwrap_err();
        assert!(refused.contains("two persons"), "{refused}");
    }
    let accepted = lacre.accept(&BY_TWO).unwrap();
    assert!(accepted["overridden"].as_str().unwrap().contains("older than its anchor"), "{accepted}");
    let (_, line) = lacre.mark();
    let record: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(record["action"], "anchor.accept");
    assert_eq!(
        (&record["details"]["by"], &record["details"]["reason"]),
        (&"ana, rui".into(), &"a drill".into())
    );
    let serving = lacre.serve();
    assert!(lacre.secrets(&["get", "kept", "--reveal"], "").contains("kept"));
    let quarantined = &lacre.status()["status"]["failing"]["quarantine"];
    assert!(quarantined.is_string(), "{}", lacre.status());
    serving.stop();
    // What was the present one is an old one now.
    lacre.put_back(&present);
    let refused = lacre.refusal();
    assert!(refused.contains("older than its anchor"), "{refused}");
}

/// TP-8: the counter is never lower than the database but for the step that a kill leaves, and that one is
/// finished by the next start.
#[test]
fn a_kill_around_the_counters_step_is_made_good_by_the_next_start() {
    let tpm = Swtpm::new();
    let proxy = Proxy::before(&tpm);
    let lacre = Installation::new(&proxy.tcti(), &tpm, "1s");
    lacre.accept(&["--by", "ana", "--reason", "new"]).unwrap();
    for (round, trap) in [
        Trap::Before(NV_INCREMENT),
        Trap::After(NV_INCREMENT),
        Trap::After(NV_INCREMENT),
        Trap::Before(NV_INCREMENT),
    ]
    .into_iter()
    .enumerate()
    {
        let serving = lacre.serve();
        let at = lacre.generation();
        proxy.lose(trap);
        lacre.secrets(&["create", &format!("s{round}"), "--kind", "opaque"], "value");
        let until = Instant::now() + Duration::from_secs(20);
        while !proxy.has_lost() {
            assert!(Instant::now() < until, "the counter was not advanced");
            std::thread::sleep(Duration::from_millis(1));
        }
        serving.kill();
        let (known, counter) = (lacre.known(), counter(&tpm));
        let ahead = u64::from(matches!(trap, Trap::Before(_)));
        assert_eq!(known, counter + ahead, "{trap:?}");
        assert!(counter >= at, "{trap:?}");

        let serving = lacre.serve();
        assert!(lacre.generation() >= known);
        lacre.secrets(&["get", &format!("s{round}"), "--reveal"], "");
        serving.kill();
    }
    // Without a kill a lost step is made good by the daemon itself.
    let serving = lacre.serve();
    let at = lacre.generation();
    proxy.lose(Trap::Before(NV_INCREMENT));
    lacre.secrets(&["create", "more", "--kind", "opaque"], "value");
    lacre.advanced_from(at);
    assert!(proxy.has_lost());
    serving.stop();
    assert_eq!(lacre.known(), counter(&tpm));
}

/// TP-8: the chip's memory wears out, so restarts do not advance the counter more often.
#[test]
fn the_counter_goes_on_no_more_than_once_a_period_over_restarts() {
    let tpm = Swtpm::new();
    let lacre = Installation::new(&tpm.tcti(), &tpm, "1h");
    lacre.accept(&["--by", "ana", "--reason", "new"]).unwrap();
    let at = counter(&tpm);
    for round in 0..3 {
        let serving = lacre.serve();
        lacre.secrets(&["create", &format!("s{round}"), "--kind", "opaque"], "value");
        serving.stop();
    }
    assert_eq!((counter(&tpm), lacre.known()), (at, at));
}

/// A counter that goes on alone while the daemon runs: the database is not the present one any more.
#[test]
fn a_database_that_stops_agreeing_with_its_anchor_is_not_ready_and_an_incident() {
    let tpm = Swtpm::new();
    let lacre = Installation::new(&tpm.tcti(), &tpm, "1s");
    lacre.accept(&["--by", "ana", "--reason", "new"]).unwrap();
    let serving = lacre.serve();
    tpm.tool(&["tpm2_nvincrement", &index(&tpm), "-C", "o"]);
    tpm.tool(&["tpm2_nvincrement", &index(&tpm), "-C", "o"]);
    let until = Instant::now() + Duration::from_secs(20);
    let address = format!("unix://{}/socket", lacre.dir.path().display());
    loop {
        let output = lacre.command(&["--addr", &address, "-o", "json", "status"]).output().unwrap();
        let status: Value = serde_json::from_slice(&output.stdout).unwrap();
        if status["ready"] == false {
            let problem = status["status"]["failing"]["anchor"].as_str().unwrap();
            assert!(problem.contains("older than its anchor"), "{problem}");
            break;
        }
        assert!(Instant::now() < until, "{status}");
        std::thread::sleep(Duration::from_millis(100));
    }
    serving.stop();
    let mut database = SqliteConnection::establish(lacre.database().to_str().unwrap()).unwrap();
    let query = "SELECT seq, body FROM audit_records WHERE action = 'incident.anchor'";
    let rows: Vec<Row> = sql_query(query).load(&mut database).unwrap();
    assert_eq!(rows.len(), 1);
    assert!(rows[0].seq > 0 && rows[0].body.contains("older than its anchor"));
}

/// A counter that somebody deleted, and one that somebody advanced.
#[test]
fn a_counter_that_is_gone_or_went_on_alone_stops_the_start() {
    let tpm = Swtpm::new();
    let lacre = Installation::new(&tpm.tcti(), &tpm, "1h");
    lacre.accept(&["--by", "ana", "--reason", "new"]).unwrap();
    let at = counter(&tpm);
    let index = index(&tpm);
    tpm.tool(&["tpm2_nvincrement", &index, "-C", "o"]);
    assert!(lacre.refusal().contains("older than its anchor"));

    tpm.tool(&["tpm2_nvundefine", &index, "-C", "o"]);
    let refused = lacre.refusal();
    assert!(refused.contains("it is gone"), "{refused}");
    let accepted = lacre.accept(&BY_TWO).unwrap();
    // A counter that is made anew starts above what the old one had.
    assert!(accepted["generation"].as_u64().unwrap() > at + 1, "{accepted}");
    lacre.serve().stop();
}
