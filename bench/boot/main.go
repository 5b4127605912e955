// Command boot measures how long a sandbox takes from the start of its
// supervisor to the end of the first program in it, as a ratio to the floor:
// the same QEMU command line and the same guest kernel with a bare init
// (bareinit/init.c) and nothing else. Rounds alternate between all rows.
//
//	go run ./bench/boot -rounds 10 -out FILE
//
// It needs bin/msb (make build), gcc, a guest kernel in one of the homes
// $MSB_HOME, build/home and ~/.microsandbox (make kernel-stock, make kernel) and
// the demo image (make demo-image). It makes a home of its own in the temporary
// directory and removes it at the end.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"

	"github.com/microsandbox-go/microsandbox/bench/machine"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

type options struct {
	rounds  int
	out     string
	msb     string
	image   string // OCI layout or archive of the image
	accel   string
	kernels *regexp.Regexp
	rows    *regexp.Regexp
	keep    bool
}

func main() {
	var o options
	kernels := flag.String("kernels", ".", "only kernels whose name (own, stock) matches this `regexp`")
	rows := flag.String("rows", ".", "only rows whose name matches this `regexp`, and the floor")
	flag.IntVar(&o.rounds, "rounds", 10, "alternating rounds")
	flag.StringVar(&o.out, "out", "", "write everything measured to this JSON `file`")
	flag.StringVar(&o.msb, "msb", "bin/msb", "the `program` under measurement")
	flag.StringVar(&o.image, "image", "build/demo-image", "OCI layout of the image of rows that have one")
	flag.StringVar(&o.accel, "accel", "auto", "auto, kvm or tcg")
	flag.BoolVar(&o.keep, "keep", false, "keep the home and its logs")
	flag.Parse()
	var err error
	if o.kernels, err = regexp.Compile(*kernels); err == nil {
		o.rows, err = regexp.Compile(*rows)
	}
	if err == nil {
		err = run(&o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/boot:", err)
		os.Exit(1)
	}
}

func run(o *options) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp("", "bench-boot")
	if err != nil {
		return err
	}
	if o.keep {
		fmt.Fprintln(os.Stderr, "home:", dir)
	} else {
		defer os.RemoveAll(dir)
	}
	r, err := newReport(ctx, o)
	if err != nil {
		return err
	}
	b := &bench{o: o, h: home.Dir(dir)}
	if err := b.prepare(ctx); err != nil {
		return err
	}
	for _, k := range b.kernels {
		res, err := b.measure(ctx, k)
		if err != nil {
			return fmt.Errorf("%s kernel: %w", k.Name, err)
		}
		r.Kernels = append(r.Kernels, *res)
	}
	r.print(os.Stdout)
	if o.out != "" {
		return machine.WriteJSON(o.out, r)
	}
	return nil
}

// bench is what all measurements share.
type bench struct {
	o       *options
	h       home.Dir
	msb     string
	init    string // the bare init
	kernels []*guestKernel
}

// prepare builds the bare init and makes the home.
func (b *bench) prepare(ctx context.Context) (err error) {
	if b.msb, err = filepath.Abs(b.o.msb); err != nil {
		return err
	}
	if _, err := os.Stat(b.msb); err != nil {
		return fmt.Errorf("%w: make build", err)
	}
	if err := b.h.Ensure(); err != nil {
		return err
	}
	if b.init, err = buildInit(ctx, string(b.h)); err != nil {
		return err
	}
	if b.kernels, err = b.findKernels(); err != nil {
		return err
	}
	if len(b.kernels) == 0 {
		return errors.New("no guest kernel: make kernel-stock, make kernel")
	}
	for k, v := range map[string]string{home.EnvVar: string(b.h), "MSB_PATH": b.msb, "MSB_ACCEL": b.o.accel} {
		if err := os.Setenv(k, v); err != nil {
			return err
		}
	}
	return b.loadImage(ctx)
}
