package diskimg

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

const mib = 1 << 20

// MinSizeMiB is the smallest disk volume: 2 MiB, of which 0.9 MiB are free for
// files. One MiB is less than ext4's smallest journal plus its metadata.
const MinSizeMiB = 2

// FormatOptions of FormatExt4; the zero value gives a random UUID and no label.
type FormatOptions struct {
	UUID  string // canonical text form
	Label string // at most 16 bytes
	// Templates is a private directory, made when it is missing, in which what
	// mkfs.ext4 makes is kept for the next image of that size; "" for none.
	Templates string
}

// FormatExt4 makes a new sparse file of exactly sizeBytes with an empty ext4
// file system whose root directory belongs to 0:0, and syncs it; its name is
// for the caller to sync. The file must not exist. On failure and when ctx ends
// nothing is left; mkfs.ext4 dies with this process.
//
// Errors: InvalidConfig for a size too small; UnsupportedOperation without
// mkfs.ext4 (package e2fsprogs); Cancelled; IO.
func FormatExt4(ctx context.Context, path string, sizeBytes int64, opt FormatOptions) error {
	f, err := CreateExt4(ctx, path, sizeBytes, opt)
	if err != nil {
		if errdefs.Is(err, errdefs.Cancelled) {
			_ = os.Remove(path)
		}
		return err
	}
	if err := Sync(f); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// CreateExt4 is FormatExt4 without the sync: the caller does that with [Sync].
// A kill may leave a second file, whose name begins with path, too. When ctx ends
// the image may stay, for the caller to remove: that takes seconds for a large one
// where the file system discards what it frees.
func CreateExt4(ctx context.Context, path string, sizeBytes int64, opt FormatOptions) (*os.File, error) {
	if sizeBytes < MinSizeMiB*mib {
		return nil, errdefs.New(errdefs.InvalidConfig, "a disk of %d bytes is too small for a file system: the smallest has %d MiB", sizeBytes, MinSizeMiB)
	}
	mkfs, err := findTool("mkfs.ext4")
	if err != nil {
		return nil, err
	}
	if opt.UUID == "" {
		opt.UUID = randomUUID()
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "make the disk image")
	}
	if err := fill(ctx, f, mkfs, sizeBytes, opt); err != nil {
		err = errors.Join(err, f.Close())
		if !errdefs.Is(err, errdefs.Cancelled) {
			err = errors.Join(err, os.Remove(path))
		}
		return nil, err
	}
	return f, nil
}

// Sync syncs and closes a new image.
func Sync(f *os.File) error {
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return errdefs.Wrap(errdefs.IO, err, "sync the disk image")
	}
	return nil
}

func fill(ctx context.Context, f *os.File, mkfs string, sizeBytes int64, opt FormatOptions) error {
	if err := ctx.Err(); err != nil {
		return errdefs.Wrap(errdefs.Cancelled, err, "format the disk")
	}
	if err := f.Truncate(sizeBytes); err != nil {
		if errors.Is(err, unix.EFBIG) {
			return errdefs.Wrap(errdefs.InvalidConfig, err, "a disk of %d MiB is larger than a file may be in %s", sizeBytes/mib, f.Name())
		}
		return errdefs.Wrap(errdefs.IO, err, "size the disk image")
	}
	t := templateFor(mkfs, sizeBytes, opt)
	if t == nil {
		return runMkfs(ctx, mkfs, f.Name(), sizeBytes, opt)
	}
	extents, unusable := t.load()
	if image, err := instance(extents, opt.UUID); err == nil {
		if err := writeExtents(f, image, sizeBytes); err != nil {
			return errdefs.Wrap(errdefs.IO, err, "format the disk image")
		}
		return nil
	}
	if err := runMkfs(ctx, mkfs, f.Name(), sizeBytes, opt); err != nil || unusable == nil {
		return err
	}
	scratch := f.Name() + ".template"
	_ = t.learn(ctx, f, scratch, mkfs, opt) // the next image is made without, then
	if err := os.Remove(scratch); err != nil && !errors.Is(err, os.ErrNotExist) {
		return errdefs.Wrap(errdefs.IO, err, "format the disk image")
	}
	return nil
}

func runMkfs(ctx context.Context, mkfs, path string, sizeBytes int64, opt FormatOptions) error {
	// e2fsprogs before 1.47 does not know the last extended option, which only
	// spares the guest the zeroing of inode tables.
	err := run(ctx, mkfs, append(mkfsArgs(sizeBytes, opt, ",assume_storage_prezeroed=1"), path))
	var exit *exec.ExitError
	if errors.As(err, &exit) && ctx.Err() == nil && !errors.Is(err, unix.ENOSPC) {
		err = run(ctx, mkfs, append(mkfsArgs(sizeBytes, opt, ""), path))
	}
	return err
}

// mkfsArgs is the one place where the layout of our file systems is decided.
// Everything that mke2fs.conf could change is said here.
func mkfsArgs(sizeBytes int64, opt FormatOptions, more string) []string {
	blockSize, inodeRatio := 4096, 16384
	if sizeBytes < 64*mib { // a journal has at least 1024 blocks: small ones here
		blockSize, inodeRatio = 1024, 4096
	}
	extended := "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0,hash_seed=" + opt.UUID + more
	if sizeBytes > 16*mib && sizeBytes < 64*mib {
		// The kernel grows a file system in transactions with room for the whole
		// reserve of group descriptors: by default it would be as large as such a
		// small journal lets a transaction be. Beyond the reserve none is needed.
		extended += fmt.Sprintf(",resize=%d", (16<<30)/blockSize)
	}
	if sizeBytes >= 64*mib {
		// By default the reserve is for a file system 1024 times as large: nearly
		// all that mkfs.ext4 writes, and of a large image nearly all that it takes.
		extended += fmt.Sprintf(",resize=%d", max(64<<30, reservedGrowth*sizeBytes)/int64(blockSize))
	}
	args := []string{
		"-q", "-F",
		"-b", fmt.Sprint(blockSize), "-I", "256", "-i", fmt.Sprint(inodeRatio),
		"-m", "0", // no blocks reserved for root: capacity is the user's
		"-O", "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum",
		"-U", opt.UUID,
		"-E", extended,
	}
	if sizeBytes >= 4*mib { // below, mkfs.ext4 insists on choosing the smallest itself
		args = append(args, "-J", fmt.Sprintf("size=%d", journalMiB(sizeBytes)))
	}
	if opt.Label != "" {
		args = append(args, "-L", opt.Label)
	}
	return args
}

// reservedGrowth is how many times its size a large file system can grow before
// the kernel has to spread the group descriptors (meta_bg), which it does then.
const reservedGrowth = 8

// journalMiB is a 32nd of the disk, at least ext4's minimum of 1024 blocks, at
// most 128 MiB.
func journalMiB(sizeBytes int64) int64 {
	least := int64(1)
	if sizeBytes >= 64*mib {
		least = 4
	}
	return min(max(sizeBytes/mib/32, least), 128)
}

// findTool returns the path of a program of e2fsprogs. The sbin directories are
// not on the PATH of an ordinary user.
func findTool(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin/", "/sbin/"} {
		if p, err := exec.LookPath(dir + name); err == nil {
			return p, nil
		}
	}
	return "", errdefs.New(errdefs.UnsupportedOperation, "disk volumes need %s, which is not installed", name).
		WithHint("install the package e2fsprogs")
}

// run extents a tool of e2fsprogs to its end. It is killed when ctx ends or this
// process dies. The kernel sends the death signal when the *thread* that
// started the child ends, so this goroutine keeps its thread until then.
func run(ctx context.Context, tool string, args []string) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, tool, args...)
	// Fixed times and no configuration file: images differ by their UUID only.
	cmd.Env = []string{"LC_ALL=C", "MKE2FS_CONFIG=/dev/null", "E2FSPROGS_FAKE_TIME=1", "SOURCE_DATE_EPOCH=1"}
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return errdefs.Wrap(errdefs.Cancelled, ctx.Err(), "format the disk")
	}
	said := lastLine(stderr.String())
	if strings.Contains(strings.ToLower(stderr.String()), unix.ENOSPC.Error()) {
		return errdefs.Wrap(errdefs.IO, unix.ENOSPC, "format the disk image") // its last line may be of a consequence
	}
	return errdefs.Wrap(errdefs.IO, err, "format the disk image: %s: %s", tool, said)
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}

func randomUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return formatUUID(b)
}
