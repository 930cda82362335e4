//! The trainer's object stores against a server of each kind: SeaweedFS for S3, fake-gcs-server for Google Cloud Storage,
//! Azurite for Azure Blob Storage. All go through one table.

mod server;
mod table;

use anyhow::Result;
use server::Server;

#[test]
fn s3() -> Result<()> {
    table::run(&Server::s3()?)
}

#[test]
fn google_cloud_storage() -> Result<()> {
    table::run(&Server::google()?)
}

#[test]
fn azure_blob_storage() -> Result<()> {
    table::run(&Server::azure()?)
}
