//! The connections to the service: on its Unix socket, and on TCP with mutual TLS.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::server::TlsStream;

use super::access::Access;
use super::identity::{Certificate, Identity};
use crate::exit::Failure;

/// Connections at once, on the socket and on TCP each: those on one cannot keep the other's clients out, nor the owner.
const MAX_CONNECTIONS: usize = 256;
/// Of these, those of one client.
const MAX_OF_A_CLIENT: usize = 64;
/// How long a client on TCP may take to show its certificate.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long to wait when the host has no file descriptor for another connection.
const RETRY: Duration = Duration::from_millis(100);

/// A connection, and whose it is.
pub struct Connection {
    stream: Stream,
    who: Arc<Identity>,
    /// Given back when it is closed.
    _permits: Vec<OwnedSemaphorePermit>,
}

enum Stream {
    Unix(UnixStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// What [`accept_on_socket`] and [`accept_on_tcp`] hand connections to.
pub type Connections = mpsc::Sender<Connection>;

/// How many connections there are, and of whom.
struct Limits {
    all: Arc<Semaphore>,
    /// By client; those that have none are forgotten.
    each: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Limits {
    fn new() -> Self {
        Self { all: Arc::new(Semaphore::new(MAX_CONNECTIONS)), each: Mutex::default() }
    }

    fn one(&self) -> Result<OwnedSemaphorePermit, String> {
        let permit = Arc::clone(&self.all).try_acquire_owned();
        permit.map_err(|_| format!("there are {MAX_CONNECTIONS} already"))
    }

    fn one_of(&self, who: &Identity) -> Result<OwnedSemaphorePermit, String> {
        let mut each = self.each.lock().unwrap_or_else(PoisonError::into_inner);
        each.retain(|_, permits| permits.available_permits() < MAX_OF_A_CLIENT);
        let permits = each.entry(who.to_string());
        let permits = permits.or_insert_with(|| Arc::new(Semaphore::new(MAX_OF_A_CLIENT)));
        let permit = Arc::clone(permits).try_acquire_owned();
        permit.map_err(|_| format!("{who} has {MAX_OF_A_CLIENT} already"))
    }
}

/// What a listener gave; not at once where the host could give nothing.
async fn taken<T>(accepted: io::Result<T>) -> Option<T> {
    match accepted {
        Ok(connection) => Some(connection),
        Err(error) => {
            tracing::warn!("No connection could be taken: {error}");
            tokio::time::sleep(RETRY).await;
            None
        }
    }
}

/// Takes connections on the Unix socket, of any user: what they may do is asked of each request.
pub async fn accept_on_socket(listener: UnixListener, access: watch::Receiver<Arc<Access>>, to: Connections) {
    let limits = Limits::new();
    let identify = |stream: &UnixStream| {
        let peer = stream.peer_cred().map_err(|error| format!("its user is not known: {error}"))?;
        let who = Identity::User { uid: peer.uid(), pid: peer.pid() };
        // Whatever others do, the owner can come and take their roles away.
        let permits = if access.borrow().is_owner(&who) {
            Vec::new()
        } else {
            vec![limits.one()?, limits.one_of(&who)?]
        };
        Ok::<_, String>((who, permits))
    };
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = to.closed() => return,
        };
        let Some((stream, _)) = taken(accepted).await else { continue };
        match identify(&stream) {
            Ok((who, permits)) => {
                let stream = Stream::Unix(stream);
                to.send(Connection { stream, who: Arc::new(who), _permits: permits }).await.ok();
            }
            Err(why) => tracing::warn!("A connection on the socket was refused: {why}"),
        }
    }
}

/// A bound TCP port.
///
/// # Errors
/// It cannot be bound.
pub async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), Failure> {
    let failure = |error| Failure::Host(format!("--listen {address}: cannot be bound: {error}"));
    let listener = TcpListener::bind(address).await.map_err(failure)?;
    let bound = listener.local_addr().map_err(failure)?;
    Ok((listener, bound))
}

/// Takes connections on TCP, of clients that show a certificate in time.
pub async fn accept_on_tcp(listener: TcpListener, tls: Arc<ArcSwap<ServerConfig>>, to: Connections) {
    let limits = Arc::new(Limits::new());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = to.closed() => return,
        };
        let Some((stream, address)) = taken(accepted).await else { continue };
        let refused = move |why: String| tracing::warn!("A connection of {address} was refused: {why}");
        let permit = match limits.one() {
            Ok(permit) => permit,
            Err(why) => {
                refused(why);
                continue;
            }
        };
        let (tls, limits, to) = (tls.load_full(), Arc::clone(&limits), to.clone());
        tokio::spawn(async move {
            let shown = handshake(stream, address, tls).await;
            match shown.and_then(|(stream, who)| Ok((stream, limits.one_of(&who)?, who))) {
                Ok((stream, of_client, who)) => {
                    let (stream, who) = (Stream::Tls(Box::new(stream)), Arc::new(who));
                    to.send(Connection { stream, who, _permits: vec![permit, of_client] }).await.ok();
                }
                Err(why) => refused(why),
            }
        });
    }
}

async fn handshake(
    stream: TcpStream,
    address: SocketAddr,
    tls: Arc<ServerConfig>,
) -> Result<(TlsStream<TcpStream>, Identity), String> {
    // An event is not to wait for the next one.
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    let handshake = tokio::time::timeout(HANDSHAKE, TlsAcceptor::from(tls).accept(stream));
    let stream = handshake.await.map_err(|_| format!("it showed no certificate within {HANDSHAKE:?}"))?;
    let stream = stream.map_err(|error| error.to_string())?;
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let certificate = certificates.first().ok_or("it showed no certificate")?;
    let who = Certificate::parse(certificate).and_then(|parsed| parsed.identify(address));
    let who = who.map_err(|error| error.to_string())?;
    Ok((stream, who))
}

impl Connection {
    pub fn who(&self) -> Arc<Identity> {
        Arc::clone(&self.who)
    }

    fn stream(self: Pin<&mut Self>) -> Pin<&mut (dyn Both + Send)> {
        match &mut self.get_mut().stream {
            Stream::Unix(stream) => Pin::new(stream),
            Stream::Tls(stream) => Pin::new(stream),
        }
    }
}

trait Both: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Both for T {}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_read(cx, to)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        self.stream().poll_write(cx, from)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream().poll_write_vectored(cx, from)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Unix(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(cx)
    }
}
