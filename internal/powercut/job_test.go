package powercut

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/powercut/writelog"
)

// jobEnv names the file that tells a process of this binary which cuts to judge.
const jobEnv = "MSB_TEST_POWERCUT_JOB"

// job is a share of the cuts of a recording. Each is carried out by a process
// with a mount namespace of its own: when that ends, however it ends, its mounts
// and its loop device go with it.
type job struct {
	Dir   string // of the recording
	FS    string // see fileSystems
	Seed  uint64
	Steps int
	Cuts  []writelog.Cut
	All   bool // see judge
	Fsck  string
	Stop  int // after so many cuts with faults; 0: never
}

// outcome is what was found at one cut. The error says that nothing could be
// judged.
type outcome struct {
	Cut    writelog.Cut
	Acked  int
	Faults []string
	Error  string
}

// judgeCuts judges cuts, in order, and returns those with faults and how many
// were judged.
func judgeCuts(t *testing.T, r *recording, j job) (bad []outcome, judged int) {
	t.Helper()
	n := max(1, min(runtime.NumCPU(), len(j.Cuts)/10, 4)) // each takes some 300 MiB
	if fileSystems[j.FS].kind == "btrfs" {
		n = 1 // it knows its disks by their ids, which all copies share
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	for i := range n {
		part := j
		part.Dir = r.dir
		part.Cuts = nil
		for k := i; k < len(j.Cuts); k += n {
			part.Cuts = append(part.Cuts, j.Cuts[k])
		}
		wg.Go(func() {
			out, err := runJob(part, filepath.Join(r.dir, fmt.Sprintf("job%d.json", i)))
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Errorf("judge: %v", err)
			}
			for _, o := range out {
				judged++
				if o.Error != "" {
					t.Errorf("cut %+v: %s", o.Cut, o.Error)
				} else if len(o.Faults) > 0 {
					bad = append(bad, o)
				}
			}
		})
	}
	wg.Wait()
	return bad, judged
}

// runJob runs a job in a process of its own.
func runJob(j job, path string) ([]outcome, error) {
	b, err := json.Marshal(j)
	if err == nil {
		err = os.WriteFile(path, b, 0o600)
	}
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), jobEnv+"="+path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	out, err := runBound(cmd)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	var list []outcome
	lines := bufio.NewScanner(bytes.NewReader(out))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var o outcome
		if err := json.Unmarshal(lines.Bytes(), &o); err != nil {
			return nil, fmt.Errorf("%w: %s", err, lines.Bytes())
		}
		list = append(list, o)
	}
	return list, lines.Err()
}

// jobMain is the process of a job. It prints an outcome per line.
func jobMain(path string) error {
	var j job
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &j)
	}
	if err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	w, err := newJudging(j)
	if err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	for faulty := 0; len(j.Cuts) > 0 && (j.Stop == 0 || faulty < j.Stop); j.Cuts = j.Cuts[1:] {
		o := w.cut(j.Cuts[0])
		if len(o.Faults) > 0 {
			faulty++
		}
		if err := out.Encode(o); err != nil {
			return err
		}
	}
	return nil
}

// judging is what a job works with.
type judging struct {
	judge
	acked  []int
	worlds []world // after each step; worlds[0] is empty
	image  *writelog.Image
	disk   *loopDisk
	fs     fileSystem
	at     string
}

func newJudging(j job) (*judging, error) {
	base, err := os.ReadFile(filepath.Join(j.Dir, "base.img"))
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(j.Dir, "disk.log"))
	if err != nil {
		return nil, err
	}
	log, err := writelog.Parse(b, diskBytes)
	if err != nil {
		return nil, err
	}
	w := &judging{judge: judge{plan: newPlan(j.Seed, j.Steps), all: j.All, fsck: j.Fsck}, image: writelog.NewImage(base, log), fs: fileSystems[j.FS]}
	w.image.Tear, w.image.Whole = w.fs.tear, w.fs.whole
	if w.acked, err = acknowledged(log); err != nil {
		return nil, err
	}
	w.worlds = []world{{map[string]*volume{}, map[string]bool{}}}
	for _, s := range w.plan.steps {
		w.worlds = append(w.worlds, w.worlds[len(w.worlds)-1].after(s))
	}
	if w.disk, err = newLoopDisk(j.Dir); err != nil {
		return nil, err
	}
	w.at, err = os.MkdirTemp(j.Dir, "mount-")
	return w, err
}

// cut judges the disk of one cut.
func (w *judging) cut(c writelog.Cut) (o outcome) {
	o = outcome{Cut: c, Acked: w.acked[c.Issued]}
	var next *step
	if o.Acked < len(w.plan.steps) {
		next = &w.plan.steps[o.Acked]
	}
	w.image.At(c, func(disk []byte) {
		if err := w.disk.load(disk); err != nil {
			o.Error = err.Error()
			return
		}
		err := w.disk.mounted(w.at, w.fs.kind, func() {
			o.Faults = w.home(filepath.Join(w.at, "home"), w.worlds[o.Acked], next)
		})
		if err != nil {
			o.Error = err.Error()
		}
	})
	return o
}
