//! Container images: built here by buildah, handed to a cluster's containerd as archives.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::{run, succeeds};
use crate::containerd::{PAUSE, ctr};
use crate::paths::{cache, repository, sha256};
use crate::site::Site;
use crate::steps::Step;
use crate::toolchain::Toolchain;

const BASE: &str = "localhost/tunesmith-base:bookworm";
const BASE_PACKAGES: &str = "libc6,libgcc-s1,ca-certificates,base-files,netbase,tzdata";

/// An image in the cache.
#[derive(Clone, Debug)]
pub struct Image {
    /// The name by which pods ask for it.
    pub reference: String,
    archive: PathBuf,
}

/// The two images of Tunesmith, each tagged by its content, so that a rebuilt program is never mistaken for the old.
#[derive(Clone, Debug)]
pub struct Images {
    /// `localhost/tunesmith-operator:dev-…`
    pub operator: Image,
    /// `localhost/tunesmith-trainer:dev-…`
    pub trainer: Image,
}

impl Images {
    /// Builds both from the programs in [`programs_folder`].
    pub fn build() -> Result<Self> {
        Ok(Self {
            operator: application("operator", "operator/Containerfile")?,
            trainer: application("trainer", "trainer-image/Containerfile")?,
        })
    }

    /// What [`build`](Images::build) made last; `None` before the first time.
    pub fn last_built() -> Result<Option<Self>> {
        let (Some(operator), Some(trainer)) = (Image::last_built("operator")?, Image::last_built("trainer")?) else {
            return Ok(None);
        };
        Ok(Some(Self { operator, trainer }))
    }
}

impl Image {
    fn application(name: &str, tag: &str) -> Result<Self> {
        Ok(Self {
            reference: format!("localhost/tunesmith-{name}:{tag}"),
            archive: folder()?.join(format!("tunesmith-{name}-{tag}.tar")),
        })
    }

    fn last_built(name: &str) -> Result<Option<Self>> {
        let tag = fs::read_to_string(folder()?.join(format!("{name}.tag")));
        let image = tag.ok().map(|tag| Self::application(name, &tag)).transpose()?;
        Ok(image.filter(|image| image.archive.exists()))
    }
}

/// The pause image, from the program that the toolchain compiled.
pub(crate) fn pause(tools: &Toolchain) -> Result<Image> {
    let image = Image { reference: PAUSE.into(), archive: folder()?.join("tunesmith-pause.tar") };
    if !image.archive.exists() {
        let context = BuildContext::new()?;
        context.add(&tools.program("pause"), "pause")?;
        context.build(&repository().join("e2e/images/pause/Containerfile"), None, &image.reference)?;
        export(&image)?;
    }
    Ok(image)
}

/// Imports an image into a cluster's containerd, unless it is there.
pub(crate) fn load(site: &Site, image: &Image) -> Result<()> {
    let present = run(ctr(site).args(["images", "list", "--quiet"]))?;
    if present.lines().any(|line| line == image.reference) {
        return Ok(());
    }
    run(ctr(site).args(["images", "import"]).arg(&image.archive))
        .with_context(|| format!("cannot load {} into the cluster", image.reference))?;
    Ok(())
}

/// Builds the image of one of Tunesmith's programs.
fn application(name: &str, containerfile: &str) -> Result<Image> {
    let step = Step::start(format!("image tunesmith-{name}"));
    let binary = format!("tunesmith-{name}");
    let program = programs_folder().join(&binary);
    let content = fs::read(&program).with_context(|| {
        format!("{} is missing: `cargo build -p {binary}` in this profile makes it", program.display())
    })?;
    let containerfile = repository().join(containerfile);
    let digest = sha256([content.as_slice(), &fs::read(&containerfile)?, BASE.as_bytes(), BASE_PACKAGES.as_bytes()]);
    let tag = format!("dev-{}", &digest[..12]);
    let image = Image::application(name, &tag)?;
    if image.archive.exists() {
        step.skipped("unchanged");
    } else {
        build_base()?;
        let context = BuildContext::new()?;
        // Where both `docker build` and the Containerfile expect it, and without symbols that nobody would load.
        let packed = context.add(&program, &format!("target/release/{binary}"))?;
        run(Command::new("strip").arg("--strip-debug").arg(&packed))?;
        context.build(&containerfile, Some("prebuilt"), &image.reference)?;
        remove_archives(&format!("tunesmith-{name}-"))?;
        export(&image)?;
        step.done();
    }
    fs::write(folder()?.join(format!("{name}.tag")), &tag)?;
    Ok(image)
}

/// The base image, which stands in for distroless where no registry is reached.
fn build_base() -> Result<()> {
    if succeeds(buildah()?.args(["inspect", "--type", "image", BASE])) {
        return Ok(());
    }
    let context = BuildContext::new()?;
    // dpkg would run a script to make the bundle of certificates; here no script runs.
    let bundle = r#"cat "$1"/usr/share/ca-certificates/mozilla/*.crt > "$1"/etc/ssl/certs/ca-certificates.crt"#;
    run(Command::new("mmdebstrap")
        .args(["--quiet", "--variant=extract"])
        .arg(format!("--include={BASE_PACKAGES}"))
        .arg(format!("--extract-hook={bundle}"))
        .arg("bookworm")
        .arg(context.folder.join("base.tar")))
    .context("the base image needs Debian's archive")?;
    context.build(&repository().join("e2e/images/base/Containerfile"), None, BASE)
}

/// The folder that a Containerfile sees, thrown away when it is built.
struct BuildContext {
    folder: PathBuf,
}

impl BuildContext {
    fn new() -> Result<Self> {
        let folder = folder()?.join(format!("context-{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self { folder })
    }

    fn add(&self, file: &Path, name: &str) -> Result<PathBuf> {
        let target = self.folder.join(name);
        fs::create_dir_all(target.parent().expect("it is below the folder"))?;
        fs::copy(file, &target).with_context(|| format!("cannot copy {}", file.display()))?;
        Ok(target)
    }

    /// Builds a stage of a Containerfile, or the last one.
    fn build(&self, containerfile: &Path, stage: Option<&str>, reference: &str) -> Result<()> {
        run(buildah()?
            .args(["build", "--isolation=chroot", "--build-arg"])
            .arg(format!("BASE={BASE}"))
            .args(stage.map(|stage| format!("--target={stage}")))
            .args(["--tag", reference, "--file"])
            .arg(containerfile)
            .arg(&self.folder))
        .with_context(|| format!("cannot build {reference}"))?;
        Ok(())
    }
}

impl Drop for BuildContext {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Moves an image from buildah's store into its archive, whole or not at all.
fn export(image: &Image) -> Result<()> {
    let unfinished = image.archive.with_extension("tmp");
    if unfinished.exists() {
        fs::remove_file(&unfinished)?;
    }
    run(buildah()?.args(["push", &image.reference]).arg(format!("docker-archive:{}", unfinished.display())))?;
    fs::rename(&unfinished, &image.archive)?;
    run(buildah()?.args(["rmi", &image.reference]))?;
    Ok(())
}

fn remove_archives(prefix: &str) -> Result<()> {
    for entry in fs::read_dir(folder()?)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// buildah with a store of its own, so that it leaves nothing in the machine's.
fn buildah() -> Result<Command> {
    let store = folder()?.join("store");
    let mut command = Command::new("buildah");
    command.arg("--root").arg(&store).arg("--runroot").arg(store.join("run")).arg("--storage-driver=vfs");
    Ok(command)
}

fn folder() -> Result<PathBuf> {
    let folder = cache()?.join("images");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

/// Where cargo puts programs of the profile that this one was built with.
pub fn programs_folder() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let folder = own.parent().unwrap_or(Path::new("."));
    match folder.ends_with("deps") {
        true => folder.parent().unwrap_or(folder).to_owned(),
        false => folder.to_owned(),
    }
}
