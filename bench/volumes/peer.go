package main

import (
	"bufio"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// The peer's packages. The platform package is an optional dependency of the
// first, which npm leaves out where it does not like the version of node.
const (
	peerPackage  = "microsandbox@0.6.18"
	peerPlatform = "@superradcompany/microsandbox-linux-x64-gnu"
)

func peerMsb(dir string) string {
	return filepath.Join(dir, "node_modules", peerPlatform, "bin", "msb")
}

// installPeer installs the peer unless it is there.
func installPeer(dir string) error {
	if _, err := os.Stat(peerMsb(dir)); err == nil {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "package.json"), []byte("{\"private\": true}\n"), 0o644); err != nil {
		return err
	}
	cmd := exec.Command("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--force", peerPackage, peerPlatform+"@0.6.18")
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("install the peer: %w", err)
	}
	_, err := os.Stat(peerMsb(dir))
	return err
}

//go:embed peer.mjs
var peerScript []byte

// peer is a Node process that plays batches of calls of the peer's SDK.
type peer struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

func startPeer(o *options, home string) (*peer, error) {
	script := filepath.Join(o.peer, "bench.mjs") // beside node_modules, where it finds them
	if err := os.WriteFile(script, peerScript, 0o644); err != nil {
		return nil, err
	}
	p := &peer{cmd: exec.Command("node", script)}
	p.cmd.Env = append(os.Environ(), "MSB_HOME="+home)
	p.cmd.Stderr = os.Stderr
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = bufio.NewScanner(stdout)
	return p, p.cmd.Start()
}

// play runs a batch and returns how long it took in the peer's own clock.
func (p *peer) play(op string, n int) (time.Duration, error) {
	if _, err := fmt.Fprintf(p.in, "{\"op\":%q,\"n\":%d}\n", op, n); err != nil {
		return 0, err
	}
	if !p.out.Scan() {
		return 0, fmt.Errorf("the peer ended in %s: %w", op, errors.Join(p.out.Err(), io.ErrUnexpectedEOF))
	}
	var answer struct {
		NS    float64
		Error string
	}
	if err := json.Unmarshal(p.out.Bytes(), &answer); err != nil {
		return 0, fmt.Errorf("the peer says %q", p.out.Text())
	}
	if answer.Error != "" {
		return 0, fmt.Errorf("the peer's %s: %s", op, answer.Error)
	}
	return time.Duration(answer.NS), nil
}

func (p *peer) stop() error {
	return errors.Join(p.in.Close(), p.cmd.Wait())
}
