package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/mount"
)

// row is one thing that boots.
type row struct {
	Name  string  `json:"name"`
	Must  float64 `json:"must,omitempty"` // bound on the ratio to row Of; 0: none
	Of    string  `json:"of"`             // the row it is compared with
	Image bool    `json:"image,omitempty"`
	Disk  bool    `json:"disk_volume,omitempty"`
	Share bool    `json:"virtiofs_volume,omitempty"`

	boot func(*bench, context.Context, *guestKernel) (sample, error)
}

// Names of rows that others are compared with.
const (
	floorRow = "bare init (the floor)"
	imageRow = "image, overlay on ext4"
)

// allRows returns the rows in the order of the tables.
func allRows() []row {
	return []row{
		{Name: floorRow, boot: (*bench).bootBare},
		{Name: "agent alone, no supervisor", Of: floorRow, boot: (*bench).bootAgent},
		{Name: "plain sandbox", Of: floorRow, Must: 1.35},
		{Name: imageRow, Of: floorRow, Image: true},
		{Name: "image and virtiofs volume", Of: imageRow, Must: 1.05, Image: true, Share: true},
		{Name: "image, ext4 volume, virtiofs volume", Of: floorRow, Must: 1.9, Image: true, Disk: true, Share: true},
	}
}

func (r row) mounts() []mount.Spec {
	var list []mount.Spec
	if r.Disk {
		list = append(list, named(diskVolume))
	}
	if r.Share {
		list = append(list, named(dirVolume))
	}
	return list
}

// program is what runs first: of the image, or the static one of the initramfs.
func (r row) program() string {
	if r.Image {
		return "/bin/true"
	}
	return truePath
}

// sample is one boot, by phases.
type sample struct {
	Prepare    time.Duration `json:"prepare_ns,omitempty"`    // before the clock starts: record, image, volumes, mkfs
	Supervisor time.Duration `json:"supervisor_ns,omitempty"` // its start, to its first step
	Mounts     time.Duration `json:"mounts_ns,omitempty"`     // volumes found and locked
	Files      time.Duration `json:"fileserver_ns,omitempty"` // confined and ready
	QEMU       time.Duration `json:"qemu_ns"`                 // spawn to QMP greeting
	Guest      time.Duration `json:"guest_ns"`                // to the first word from PID 1; sandboxes: to ready
	Setup      time.Duration `json:"setup_ns,omitempty"`      // hello to ready
	Listen     time.Duration `json:"listen_ns,omitempty"`     // sockets, record, status to the caller
	Exec       time.Duration `json:"first_exec_ns"`           // connect, start, exit of the first program
	Stop       time.Duration `json:"stop_ns"`                 // request to the last process gone
	Memory     int64         `json:"pss_bytes"`               // after the first program
}

// total is boot to first exec.
func (s sample) total() time.Duration {
	return s.Supervisor + s.Mounts + s.Files + s.QEMU + s.Guest + s.Setup + s.Listen + s.Exec
}

// measure boots every row once to fill caches and then in alternating rounds.
func (b *bench) measure(ctx context.Context, k *guestKernel) (*kernelResult, error) {
	res := &kernelResult{Name: k.Name, Release: k.Release}
	for _, r := range allRows() {
		if r.Name == floorRow || b.o.rows.MatchString(r.Name) {
			res.Rows = append(res.Rows, rowResult{row: r})
		}
	}
	for round := range b.o.rounds + 1 {
		for i := range res.Rows {
			r := &res.Rows[i]
			s, err := b.boot(ctx, k, r.row)
			if err != nil {
				return nil, fmt.Errorf("%s, round %d: %w", r.Name, round, err)
			}
			if round > 0 {
				r.Samples = append(r.Samples, s)
			}
			fmt.Fprintf(os.Stderr, "%s %d %-36s %4d ms\n", k.Name, round, r.Name, s.total().Milliseconds())
		}
	}
	return res, nil
}

func (b *bench) boot(ctx context.Context, k *guestKernel, r row) (sample, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	if r.boot != nil {
		return r.boot(b, ctx, k)
	}
	return b.bootSandbox(ctx, k, r)
}

// memoryOf sums the proportional set sizes of processes in bytes; 0 where the
// kernel does not tell.
func memoryOf(pids ...int) int64 {
	var sum int64
	for _, pid := range pids {
		if pid <= 0 {
			continue
		}
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		for line := range strings.Lines(string(text)) {
			var kib int64
			if n, _ := fmt.Sscanf(line, "Pss: %d kB", &kib); n == 1 {
				sum += kib << 10
			}
		}
	}
	return sum
}
