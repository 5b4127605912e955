package supervisor

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/records"
	"github.com/microsandbox-go/microsandbox/internal/version"
)

// Statuses of a sandbox record. "creating" and "starting" are the creator's;
// whatever a record says, a sandbox whose lock is free does not live.
const (
	StatusCreating = "creating"
	StatusStarting = "starting"
	StatusRunning  = "running"
	StatusDraining = "draining"
	StatusStopped  = "stopped"
	StatusCrashed  = "crashed"
)

// SupervisorGone is the cause of a crash that no supervisor lived to record.
const SupervisorGone = "supervisor gone"

// Main is the entry of `msb supervise`; agent is the guest agent built into msb.
// Its descriptors are fdRequest and following; it is started by Launch only.
func Main(agent []byte) int {
	for fd := fdRequest; fd <= fdLifeline; fd++ {
		unix.CloseOnExec(fd)
	}
	raiseFileLimit()
	statusFile := os.NewFile(fdStatus, "status")
	if statusFile == nil {
		fmt.Fprintln(os.Stderr, "msb supervise: started by hand; use msb create or msb start")
		return 2
	}
	out := json.NewEncoder(statusFile)
	if out.Encode(status{Version: version.Version}) != nil {
		return 1
	}
	s, attached, err := receive(agent)
	if err != nil {
		_ = out.Encode(status{Failure: newFailure(err)})
		return 1
	}
	return s.main(attached, out)
}

// wantFiles is the hard limit of descriptors a file server is given if this
// process may raise it: it keeps one for each file that its guest knows.
const wantFiles = 1 << 18

// raiseFileLimit is for a privileged supervisor; another keeps what it has.
func raiseFileLimit() {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) == nil && l.Max < wantFiles {
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: l.Cur, Max: wantFiles})
	}
}

// receive reads the request of the creator.
func receive(agent []byte) (*supervisor, bool, error) {
	var req request
	f := os.NewFile(fdRequest, "request")
	err := json.NewDecoder(io.LimitReader(f, 16<<20)).Decode(&req)
	f.Close()
	if err != nil {
		return nil, false, errdefs.Wrap(errdefs.Internal, err, "supervisor request")
	}
	if req.Version != version.Version {
		return nil, false, errdefs.New(errdefs.LibraryNotLoaded, "msb is version %s, the program that started it is %s", version.Version, req.Version).
			WithHint("install the msb of the same release, or point MSB_PATH at it")
	}
	msb, err := os.Executable()
	if err != nil {
		return nil, false, err
	}
	s := &supervisor{
		h: home.Dir(req.Home), cfg: req.Config, msb: msb, agent: agent,
		lock: os.NewFile(fdLock, "lock"), began: time.Now(),
		stop: make(chan stopRequest, 1), state: StatusStarting, attached: req.Attached,
	}
	return s, req.Attached, nil
}

// main runs the sandbox to its end and records how it ended.
func (s *supervisor) main(attached bool, out *json.Encoder) int {
	lifeline := s.watchLifeline(attached)
	log, err := openOutputLog(s.logPath(""))
	if err != nil {
		_ = out.Encode(status{Failure: newFailure(err)})
		return 1
	}
	s.log = log
	defer log.close()
	ctx, cancel := context.WithCancel(context.Background())
	signalled := watchSignals()
	go func() { // a creator that dies during the boot ends it
		select {
		case <-lifeline:
		case <-signalled:
		}
		cancel()
	}()
	if err := s.startAny(ctx, func(step string) { _ = out.Encode(status{Step: step}) }); err != nil {
		if out.Encode(status{Failure: newFailure(err)}) != nil {
			s.abandoned()
		}
		return 1
	}
	s.setState(StatusRunning)
	s.record(StatusRunning, "")
	_ = out.Encode(status{Ready: true}) // a creator that has gone is the lifeline's matter

	ended, cause := s.wait(lifeline, signalled)
	s.tearDown()
	s.finish(ended, cause)
	if ended != StatusCrashed {
		cause = ""
	}
	_ = out.Encode(status{Ended: &cause})
	return 0
}

// watchSignals returns a channel that closes when somebody asks this process to
// end. Further signals change nothing: the end is under way.
func watchSignals() <-chan struct{} {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	asked := make(chan struct{})
	go func() {
		<-signals
		close(asked)
	}()
	return asked
}

// abandoned records the end of a start whose creator has gone and cannot do so.
// What a creation leaves is deleted by the next mutating command instead.
func (s *supervisor) abandoned() {
	err := s.withDB(func(ctx context.Context, db *records.DB) error {
		rec, err := db.SandboxByID(ctx, s.cfg.ID)
		if err != nil || rec.Status != StatusStarting {
			return err
		}
		return db.UpdateSandbox(ctx, s.cfg.ID, StatusStopped, creatorGone, nil)
	})
	if err != nil && !errdefs.Is(err, errdefs.SandboxNotFound) {
		s.log.system("record the end: " + err.Error())
	}
}

// finish records the end; an ephemeral sandbox leaves nothing.
func (s *supervisor) finish(status, cause string) {
	if s.cfg.Ephemeral {
		if err := s.forget(); err != nil {
			fmt.Fprintln(os.Stderr, "msb supervise: remove ephemeral sandbox:", err)
		}
		return
	}
	if status == StatusCrashed {
		s.log.system("crashed: " + cause)
	}
	s.record(status, cause)
}

// record stores a status. A database that cannot be written changes nothing for
// the sandbox: its state is derived from its lock.
func (s *supervisor) record(status, cause string) {
	err := s.withDB(func(ctx context.Context, db *records.DB) error {
		return db.UpdateSandbox(ctx, s.cfg.ID, status, cause, nil)
	})
	if err != nil && !errdefs.Is(err, errdefs.SandboxNotFound) {
		s.log.system(fmt.Sprintf("record %s: %v", status, err))
	}
}

func (s *supervisor) forget() error {
	err := s.withDB(func(ctx context.Context, db *records.DB) error { return db.DeleteSandbox(ctx, s.cfg.ID) })
	if err != nil && !errdefs.Is(err, errdefs.SandboxNotFound) {
		return err
	}
	return removeDir(s.h.Sandbox(s.cfg.Name))
}

// removeDir removes a sandbox's directory, the lock last: while it is there,
// and held, the sandbox is not gone.
func removeDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != lockName {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return os.RemoveAll(dir)
}

func (s *supervisor) withDB(do func(context.Context, *records.DB) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	db, err := records.Open(ctx, s.h)
	if err != nil {
		return err
	}
	return errors.Join(do(ctx, db), db.Close())
}

// watchLifeline returns a channel that closes when the creator of an attached
// sandbox has gone without detaching it. The creator holds the only write end
// of the pipe; the byte 'd' detaches.
func (s *supervisor) watchLifeline(attached bool) <-chan struct{} {
	gone := make(chan struct{})
	if !attached {
		return gone
	}
	go func() {
		f := os.NewFile(fdLifeline, "lifeline")
		defer f.Close()
		if b, err := bufio.NewReader(f).ReadByte(); err == nil && b == 'd' {
			s.mu.Lock()
			s.attached = false
			s.mu.Unlock()
			return
		}
		close(gone)
	}()
	return gone
}

func asError(err error, target **errdefs.Error) bool { return errors.As(err, target) }
func isBusy(err error) bool                          { return errors.Is(err, errdefs.ErrVolumeInUse) }
