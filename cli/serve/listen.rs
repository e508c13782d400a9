//! A port -> connections, each with its time limits; SIGTERM ends it all in order.

use super::Arguments;
use super::app::{App, Work};
use super::routes;
use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use mansard_ir::{Error, Result};
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Serves until SIGTERM or SIGINT, then lets answers on their way end.
///
/// # Errors
/// Where the port is taken.
pub async fn serve(app: Arc<App>, arguments: &Arguments) -> Result<()> {
    let address = SocketAddr::new(arguments.host, arguments.port);
    let place = |e: std::io::Error| Error::io(address.to_string(), e);
    let listener = TcpListener::bind(address).await.map_err(place)?;
    let mut signals = [SignalKind::terminate(), SignalKind::interrupt()].map(signal);
    let bound = listener.local_addr().map_err(place)?;
    eprintln!("serving `{}` on http://{bound}", app.name);
    if app.keys.is_none() && !arguments.host.is_loopback() {
        eprintln!("note: everybody who reaches {bound} may ask; --api-key-file restricts that");
    }
    let (router, open) = (routes::router(&app), GracefulShutdown::new());
    let places = Arc::new(Semaphore::new(arguments.max_connections));
    loop {
        // Beyond the most connections, the others wait with the operating system.
        let Ok(place) = places.clone().acquire_owned().await else { break };
        tokio::select! {
            connection = listener.accept() => match connection {
                Ok((stream, _)) => connect(stream, &app, &router, &open, place),
                // Too many files are open, or the client has left already.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
            () = ended(&mut signals) => break,
        }
    }
    drop(listener);
    eprintln!("ending: answers on their way have {} seconds", arguments.drain_seconds);
    let patience = Duration::from_secs(arguments.drain_seconds);
    let all = tokio::time::timeout(patience, open.shutdown()).await;
    if let Work::Generate(service) = &app.work {
        service.lock().unwrap_or_else(PoisonError::into_inner).drain(Duration::ZERO);
    }
    if all.is_err() {
        eprintln!("some answers were cut off");
    }
    Ok(())
}

async fn ended(signals: &mut [std::io::Result<Signal>; 2]) {
    let [terminate, interrupt] = signals;
    let wait = async |signal: &mut std::io::Result<Signal>| match signal {
        Ok(signal) => drop(signal.recv().await),
        Err(_) => std::future::pending().await,
    };
    tokio::select! {
        () = wait(terminate) => {}
        () = wait(interrupt) => {}
    }
}

/// Serves one connection on a task of its own. Its head has to come in time, again and again.
fn connect(stream: TcpStream, app: &Arc<App>, router: &Router, open: &GracefulShutdown, place: OwnedSemaphorePermit) {
    // Tokens are small and come one by one.
    let _ = stream.set_nodelay(true);
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(app.read_time).max_buf_size(64 << 10);
    let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router.clone()));
    let connection = open.watch(connection);
    let app = app.clone();
    tokio::spawn(async move {
        app.http.connections.fetch_add(1, Ordering::Relaxed);
        // Whatever ended it, there is nobody left to tell.
        let _ = connection.await;
        app.http.connections.fetch_sub(1, Ordering::Relaxed);
        drop(place);
    });
}
