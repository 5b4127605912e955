package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// program is one side of a row of commands.
type program struct {
	msb  string
	home string
	ours bool
}

// command is a row of whole processes. prepare is not timed; both get a number
// that differs in every round.
type command struct {
	row
	prepare func(p program, round int) error
	argv    func(round int) []string // of msb
	floor   func(dir string, round int) []string
	home    string // name of the home, "" the common one
	rounds  int    // 0: what was asked for
}

func name(round int) string { return fmt.Sprint("n", round) }

func fixed(argv ...string) func(int) []string { return func(int) []string { return argv } }

func volumeCmd(verb string, more ...string) func(int) []string {
	return func(round int) []string { return append([]string{"volume", verb, "-q", name(round)}, more...) }
}

// made creates the round's volume.
func made(more ...string) func(program, int) error {
	return func(p program, round int) error { return p.run(volumeCmd("create", more...)(round)) }
}

// mkfs is the command that makes an empty file system of a size.
func mkfs(size string) func(dir string, round int) []string {
	return func(dir string, round int) []string {
		return []string{"/usr/sbin/mkfs.ext4", "-F", "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", filepath.Join(dir, name(round)), size}
	}
}

func (o *options) commandRows() []command {
	many := fmt.Sprint(o.many)
	ms := func(name string, must, moon float64) row {
		return row{Name: name, Unit: "ms", Must: must, Moonshot: moon}
	}
	return []command{
		{row: ms("msb --version", 0.7, 0.45), argv: fixed("--version"), floor: func(string, int) []string { return []string{"/bin/true"} }},
		{row: ms("volume create, warm home (ours durable)", 0.5, 0.3), argv: volumeCmd("create")},
		{row: ms("volume create, cold home (ours durable)", 0.35, 0.25), home: "cold", argv: volumeCmd("create"),
			prepare: func(p program, _ int) error { return os.RemoveAll(p.home) }},
		{row: ms("volume create --kind disk, 1 GiB (ours durable)", 0.5, 0.3), argv: volumeCmd("create", "--kind", "disk", "--size", "1G"), floor: mkfs("1G")},
		{row: ms("volume create --kind disk, 1 GiB, first of its size (ours durable)", 0, 0), argv: volumeCmd("create", "--kind", "disk", "--size", "1G"), floor: mkfs("1G"), rounds: 10,
			prepare: func(p program, _ int) error { return os.RemoveAll(filepath.Join(p.home, "templates")) }},
		{row: ms("volume create --kind disk, 100 GiB (ours durable)", 0.3, 0.12), argv: volumeCmd("create", "--kind", "disk", "--size", "100G"), floor: mkfs("100G"), rounds: 10},
		{row: ms("volume ls, none", 0.4, 0.27), home: "empty", argv: fixed("volume", "ls")},
		{row: ms("volume ls, "+many, 0.4, 0.25), home: "many", argv: fixed("volume", "ls")},
		{row: ms("volume ls --format json, "+many, 0.4, 0.25), home: "many", argv: fixed("volume", "ls", "--format", "json")},
		{row: ms("volume inspect, of "+many, 0.4, 0.33), home: "many", argv: fixed("volume", "inspect", "v77")},
		{row: ms("volume rm, empty (ours durable)", 0.5, 0.28), argv: volumeCmd("rm"), prepare: made()},
		{row: ms("volume rm, disk of 1 GiB", 0.5, 0), argv: volumeCmd("rm"), prepare: made("--kind", "disk", "--size", "1G"), rounds: 10},
	}
}

// lastRows are measured after all others. They delete so many files that making one
// takes several times as long for minutes: ext4 gives an inode to nobody within 60 s
// of its deletion, and passes all such by one by one (recently_deleted in
// fs/ext4/ialloc.c, Linux 6.18).
func (o *options) lastRows() []command {
	removal := row{Name: "volume rm, 10 000 files", Unit: "ms", Must: 1, Moonshot: 0.1}
	return []command{
		{row: removal, argv: volumeCmd("rm"), rounds: 7, prepare: func(p program, round int) error {
			if err := made()(p, round); err != nil {
				return err
			}
			return manyFiles(filepath.Join(p.home, "volumes", name(round), "files"), 10000)
		}},
	}
}

func commands(o *options, r *report) error { return o.measureAll(r, o.commandRows()) }

func lastCommands(o *options, r *report) error { return o.measureAll(r, o.lastRows()) }

// measureAll measures rows of commands, rounds of all sides in turns.
func (o *options) measureAll(r *report, rows []command) error {
	for _, c := range rows {
		if !o.rows.MatchString(c.Name) {
			continue
		}
		if c.home == "many" {
			if err := fillHomes(o); err != nil {
				return err
			}
		}
		if err := c.measure(o); err != nil {
			return fmt.Errorf("%s: %w", c.Name, err)
		}
		r.add(c.row)
	}
	return nil
}

// fillHomes makes many volumes on both sides, once.
func fillHomes(o *options) error {
	if _, err := os.Stat(filepath.Join(o.dir, "many")); err == nil {
		return nil
	}
	p, err := startPeer(o, filepath.Join(o.dir, "many", "peer"))
	if err != nil {
		return err
	}
	_, err = p.play("fill volumes", o.many)
	s, err2 := startOurs(filepath.Join(o.dir, "many", "ours"))
	if err2 == nil {
		_, err2 = s.play("fill volumes", o.many)
		err2 = errors.Join(err2, s.stop())
	}
	return errors.Join(err, err2, p.stop())
}

func (c *command) measure(o *options) error {
	where := filepath.Join(o.dir, c.home)
	if c.home == "" {
		where = filepath.Join(o.dir, "commands")
	}
	floorDir := filepath.Join(o.dir, "floor")
	if err := os.MkdirAll(floorDir, 0o700); err != nil {
		return err
	}
	sides := []program{{msb: peerMsb(o.peer), home: where + "/peer"}, {msb: o.msb, home: where + "/ours", ours: true}}
	rounds := o.rounds
	if c.rounds > 0 {
		rounds = min(rounds, c.rounds)
	}
	start := time.Now()
	for round := -2; round < rounds && !o.enough(start, round); round++ {
		times := make([]float64, 3)
		for i, p := range sides {
			took, err := c.once(p, i+10*(round+10))
			if err != nil {
				return err
			}
			times[i] = took
		}
		if c.floor != nil {
			took, err := timed(exec.Command(c.floor(floorDir, round)[0], c.floor(floorDir, round)[1:]...))
			if err != nil {
				return err
			}
			times[2] = c.value(took)
		}
		if round < 0 {
			continue
		}
		c.Peer, c.Ours = append(c.Peer, times[0]), append(c.Ours, times[1])
		if c.floor != nil {
			c.Floor = append(c.Floor, times[2])
		}
	}
	return os.RemoveAll(floorDir)
}

// once prepares and times one command. Names are used again in other rows, so
// what is left of this one is removed.
func (c *command) once(p program, round int) (float64, error) {
	if c.prepare != nil {
		if err := c.prepare(p, round); err != nil {
			return 0, err
		}
	}
	took, err := timed(p.command(c.argv(round)))
	if err != nil {
		return 0, err
	}
	if argv := c.argv(round); len(argv) > 1 && argv[1] == "create" && c.home != "cold" {
		if err := p.run(volumeCmd("rm")(round)); err != nil {
			return 0, err
		}
	}
	return c.value(took), p.settle()
}

func (p program) command(argv []string) *exec.Cmd {
	cmd := exec.Command(p.msb, argv...)
	cmd.Env = append(os.Environ(), "MSB_HOME="+p.home)
	return cmd
}

func (p program) run(argv []string) error {
	_, err := timed(p.command(argv))
	return err
}

// allocated is what the image of a new disk volume takes on the host.
func allocated(o *options, r *report) error {
	c := row{Name: "image of 100 GiB, allocated", Unit: "MiB", Must: 1, Moonshot: 0.12}
	if !o.rows.MatchString(c.Name) {
		return nil
	}
	const volume = "image"
	for name, to := range map[string]*[]float64{"peer": &c.Peer, "ours": &c.Ours, "floor": &c.Floor} {
		p := program{msb: peerMsb(o.peer), home: filepath.Join(o.dir, "allocated", name)}
		if name == "ours" {
			p.msb = o.msb
		}
		argv := []string{"volume", "create", "-q", "--kind", "disk", "--size", "100G", volume}
		cmd := p.command(argv)
		at := filepath.Join(p.home, "volumes", volume)
		if name == "floor" {
			if err := os.MkdirAll(at, 0o700); err != nil {
				return err
			}
			argv := mkfs("100G")(at, 0)
			cmd = exec.Command(argv[0], argv[1:]...)
		}
		if _, err := timed(cmd); err != nil {
			return err
		}
		size, err := blocksBelow(at)
		if err != nil {
			return err
		}
		*to = append(*to, float64(size)/(1<<20))
	}
	r.add(c)
	return nil
}

// blocksBelow sums what the files of a directory take, in bytes.
func blocksBelow(dir string) (sum int64, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && d.Type().IsRegular() {
			err = unix.Lstat(path, &st)
			sum += st.Blocks * 512
		}
		return err
	})
	if err == nil && sum == 0 {
		err = fmt.Errorf("%s holds no image", dir)
	}
	return sum, err
}

// settle waits until nothing works in the background any more.
func (p program) settle() error {
	if !p.ours {
		return nil
	}
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		left, err := os.ReadDir(filepath.Join(p.home, "volumes", ".trash"))
		if len(left) == 0 || errors.Is(err, os.ErrNotExist) {
			return nil
		}
	}
	return errors.New("the trash is not emptied")
}

// timed runs a command from start to exit, output to nowhere.
func timed(cmd *exec.Cmd) (time.Duration, error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	start := time.Now()
	err := cmd.Run()
	took := time.Since(start)
	if err != nil {
		return 0, fmt.Errorf("%v: %w: %s", cmd.Args, err, stderr.Bytes())
	}
	return took, nil
}
