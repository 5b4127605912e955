// Command virtiofs compares our virtio-fs server with Debian's C virtiofsd
// under a native vhost-user front end: no guest, so that the servers are what
// is measured. Every figure is a ratio between servers in the same run; rounds
// alternate between them.
//
//	go run ./bench/virtiofs -rounds 7 -out FILE
//
// It needs root (C virtiofsd does), the package qemu-system-common and about
// 1 GiB in the temporary directory, on a file system with user extended
// attributes.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/microsandbox-go/microsandbox/bench/machine"
)

type options struct {
	rounds  int
	each    time.Duration
	out     string
	rows    *regexp.Regexp
	c       string
	dir     string
	profile string
	bare    bool
	ours    string
}

func main() {
	var o options
	rows := flag.String("rows", ".", "only rows whose name matches this `regexp`")
	flag.IntVar(&o.rounds, "rounds", 7, "alternating rounds per row")
	flag.DurationVar(&o.each, "each", 200*time.Millisecond, "length of a round")
	flag.StringVar(&o.out, "out", "", "write everything measured to this JSON `file`")
	flag.StringVar(&o.c, "virtiofsd", "/usr/lib/qemu/virtiofsd", "the server to compare with")
	flag.BoolVar(&o.bare, "bare", false, "measure our server without its confinement, instead of msb virtiofs")
	flag.StringVar(&o.ours, "ours", "", "our server (msb, or ourserver with -bare), instead of building it")
	flag.StringVar(&o.dir, "dir", "", "work in this directory instead of a temporary one, and keep its tree")
	flag.StringVar(&o.profile, "cpuprofile", "", "write a CPU profile of our server (stat-virt off, -bare)")
	flag.Parse()
	var err error
	if o.rows, err = regexp.Compile(*rows); err == nil {
		err = run(&o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/virtiofs:", err)
		os.Exit(1)
	}
}

func run(o *options) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("root is needed to run C virtiofsd")
	}
	if _, err := os.Stat(o.c); err != nil {
		return fmt.Errorf("%w: install the package qemu-system-common", err)
	}
	if o.dir == "" {
		if o.dir, err = os.MkdirTemp("", "bench-virtiofs"); err != nil {
			return err
		}
		defer os.RemoveAll(o.dir)
	}
	tree := filepath.Join(o.dir, "tree")
	if err := makeTree(tree); err != nil {
		return err
	}
	release, err := keepWarm(tree)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, release()) }()
	if o.ours == "" {
		if o.ours, err = buildOurs(o.dir, o.bare, os.Stderr); err != nil {
			return fmt.Errorf("build our server: %w", err)
		}
	}
	r, err := measureAll(o, tree)
	if err != nil {
		return err
	}
	r.print(os.Stdout)
	if o.out != "" {
		return machine.WriteJSON(o.out, r)
	}
	return nil
}

// measureAll runs every row.
func measureAll(o *options, tree string) (*report, error) {
	r := newReport(o)
	b := &bench{o: o, tree: tree}
	if err := b.launchAll(); err != nil {
		return nil, errors.Join(err, b.stop())
	}
	err := b.rows(r)
	if err := errors.Join(err, b.stop()); err != nil {
		return nil, err
	}
	if err := b.figures(r); err != nil {
		return nil, err
	}
	return r, nil
}

// bench is the servers under measurement.
type bench struct {
	o    *options
	tree string
	c    *server // C virtiofsd
	off  *server // ours with stat-virt=off, which does what C does
	virt *server // ours with the default stat virtualization
}

func (b *bench) argv(kind string) []string {
	if kind == "c" {
		return []string{b.o.c, "--socket-path=SOCKET", "-o", "source=" + b.tree, "-o", "sandbox=chroot"}
	}
	if !b.o.bare {
		return []string{b.o.ours, "virtiofs", "--socket", "SOCKET", "--dir", b.tree, "--stat-virt", kind}
	}
	argv := []string{b.o.ours, "-socket", "SOCKET", "-dir", b.tree, "-stat-virt", kind}
	if b.o.profile != "" && kind == "off" {
		argv = append(argv, "-cpuprofile", b.o.profile)
	}
	return argv
}

func (b *bench) launchAll() (err error) {
	if b.c, err = launch("c", b.o.dir, b.argv("c")); err != nil {
		return err
	}
	if b.off, err = launch("off", b.o.dir, b.argv("off")); err != nil {
		return err
	}
	b.virt, err = launch("strict", b.o.dir, b.argv("strict"))
	return err
}

func (b *bench) stop() error {
	var errs []error
	for _, s := range []*server{b.c, b.off, b.virt} {
		if s != nil {
			errs = append(errs, s.stop())
		}
	}
	return errors.Join(errs...)
}

// rows measures the rows that compare.
func (b *bench) rows(r *report) error {
	for _, row := range allRows() {
		if !b.o.rows.MatchString(row.Name) {
			continue
		}
		res := result{row: row}
		for range b.o.rounds {
			for _, s := range []struct {
				s  *server
				to *[]sample
			}{{b.c, &res.C}, {b.off, &res.Ours}, {b.virt, &res.Virt}} {
				one, err := b.round(s.s, row)
				if err != nil {
					return fmt.Errorf("%s on %s: %w", row.Name, s.s.name, err)
				}
				*s.to = append(*s.to, one)
			}
		}
		r.add(res)
		fmt.Fprintf(os.Stderr, "%s\n", res.line())
	}
	return nil
}

// round plays one row on one server once.
func (b *bench) round(s *server, row row) (sample, error) {
	p, err := row.load(s, row.Depth)
	if err != nil {
		return sample{}, err
	}
	var one sample
	err = urgently(func() (err error) {
		one, err = play(s, p, row.Depth, b.o.each)
		return err
	})
	return one, errors.Join(err, p.close())
}
