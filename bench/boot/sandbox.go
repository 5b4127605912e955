package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/microsandbox-go/microsandbox/internal/agentclient"
	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/mount"
	"github.com/microsandbox-go/microsandbox/internal/records"
	"github.com/microsandbox-go/microsandbox/internal/sandbox"
	"github.com/microsandbox-go/microsandbox/internal/supervisor"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// Names in the benchmark's home.
const (
	imageName  = "bench"
	dirVolume  = "bench-dir"
	diskVolume = "bench-disk"
	stopGrace  = 10 * time.Second
)

// loadImage puts the image and two volumes into the home.
func (b *bench) loadImage(ctx context.Context) error {
	if _, err := sandbox.Images(b.h).Load(ctx, b.o.image, []string{imageName}, nil); err != nil {
		return fmt.Errorf("%w: make demo-image", err)
	}
	vols := volstore.New(b.h)
	_, err := vols.Create(ctx, volstore.Spec{Name: dirVolume, Kind: mount.VolumeDir})
	if err == nil {
		_, err = vols.Create(ctx, volstore.Spec{Name: diskVolume, Kind: mount.VolumeDisk, SizeMiB: 256})
	}
	return errors.Join(err, vols.Close())
}

func named(volume string) mount.Spec {
	return mount.Spec{Guest: "/" + volume, Kind: mount.KindNamed, Source: volume}
}

// bootSandbox measures a sandbox as msb makes them: supervisor, confinement,
// file server, agent. The clock starts when its record, volumes and disks are
// there and its supervisor is started (s.Prepare is what was before) and ends
// with the first program.
func (b *bench) bootSandbox(ctx context.Context, k *guestKernel, r row) (s sample, err error) {
	if err := os.Setenv("MSB_KERNEL", k.Hash); err != nil {
		return s, err
	}
	st := sandbox.New(b.h)
	name := "bench-" + ulid.Make().String()
	w := &watch{last: time.Now(), into: &s}
	run, err := b.launch(ctx, st, name, r, w)
	if err != nil {
		return s, err
	}
	s.Listen = w.next()
	err = first(ctx, run, r.program())
	s.Exec = w.next()
	if err == nil {
		s.Memory = b.memory(ctx, run)
	}
	w.next()
	err = errors.Join(err, st.Stop(ctx, name, stopGrace))
	s.Stop = w.next()
	if _, ok := run.Ended(ctx); !ok && err == nil {
		err = ctx.Err()
	}
	return s, errors.Join(err, st.Remove(ctx, name))
}

// launch makes a sandbox, or starts one whose record says that it has no image.
func (b *bench) launch(ctx context.Context, st *sandbox.Store, name string, r row, w *watch) (*sandbox.Running, error) {
	if r.Image {
		return st.Create(ctx, &sandbox.Spec{Name: name, Image: imageName, PullPolicy: "never", Mounts: r.mounts(), Progress: w.step})
	}
	cfg := supervisor.Config{
		ID: ulid.Make().String(), Name: name, CPUs: sandbox.DefaultCPUs, MemoryMiB: sandbox.DefaultMemoryMiB,
		Accel: b.o.accel, Hostname: "bench",
	}
	if err := b.record(ctx, cfg); err != nil {
		return nil, err
	}
	return st.Start(ctx, name, sandbox.StartOptions{Progress: w.step})
}

// record stores a stopped sandbox without an image.
func (b *bench) record(ctx context.Context, cfg supervisor.Config) error {
	if err := os.MkdirAll(filepath.Join(b.h.Sandbox(cfg.Name), "logs"), 0o700); err != nil {
		return err
	}
	raw, err := json.Marshal(cfg)
	if err != nil {
		return err
	}
	db, err := records.Open(ctx, b.h)
	if err != nil {
		return err
	}
	now := time.Now().UTC()
	err = db.InsertSandbox(ctx, &records.Sandbox{
		ID: cfg.ID, Name: cfg.Name, Status: supervisor.StatusStopped, Config: raw, CreatedAt: now, UpdatedAt: now,
	})
	return errors.Join(err, db.Close())
}

// watch turns the progress of a launch into phases. It is called by one
// goroutine at a time.
type watch struct {
	last time.Time
	into *sample
}

func (w *watch) next() time.Duration {
	now := time.Now()
	d := now.Sub(w.last)
	w.last = now
	return d
}

func (w *watch) step(p sandbox.Progress) {
	if p.Step != "boot" {
		return
	}
	switch p.Message {
	case "mounts":
		w.into.Supervisor = w.next()
	case "fileserver":
		w.into.Mounts = w.next()
	case "boot":
		w.into.Files = w.next()
	case "agent":
		w.into.QEMU = w.next()
	case "listen":
		w.into.Guest = w.next()
	default: // the supervisor is about to be started
		w.into.Prepare = w.next()
	}
}

// first runs the first program of a sandbox over a connection of its own.
func first(ctx context.Context, run *sandbox.Running, program string) error {
	c, err := run.Dial(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	nothing := false
	e, err := c.StartExec(ctx, agentproto.Exec{Cmd: program, Stdin: &nothing})
	if err != nil {
		return err
	}
	for {
		ev, err := e.Recv(ctx)
		switch {
		case err != nil:
			return err
		case ev.Kind == agentclient.Exited && ev.Code == 0:
			return nil
		case ev.Kind == agentclient.Failed && program == truePath:
			return fmt.Errorf("%s: %s; was msb built with another agent than this program? make build", program, ev.Failure.Message)
		case ev.Kind == agentclient.Exited || ev.Kind == agentclient.Failed || ev.Kind == agentclient.Done:
			return fmt.Errorf("%s: %+v", program, ev)
		}
	}
}

// memory is the proportional set size of a sandbox's processes in bytes.
func (b *bench) memory(ctx context.Context, run *sandbox.Running) int64 {
	l, err := run.Live(ctx)
	if err != nil {
		return 0
	}
	return memoryOf(l.SupervisorPID, l.VMMPID, l.FileServerPID)
}
