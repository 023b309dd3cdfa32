package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The test binary is its own child, by what this variable says.
const behave = "ENTENTE_TEST_CHILD"

func TestMain(m *testing.M) {
	switch os.Getenv(behave) {
	case "":
		os.Exit(m.Run())
	case "sleep":
		fmt.Println("awake")
		time.Sleep(time.Minute)
	case "fail":
		fmt.Println("first line")
		fmt.Fprintln(os.Stderr, "the disk is on fire")
		os.Exit(3)
	case "parent": // starts a child, says its pid, and waits to be killed
		s := New()
		p, err := s.Start(child("sleep", filepath.Join(os.Args[1], "grandchild.log")))
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(p.PID())
		time.Sleep(time.Minute)
	}
	os.Exit(0)
}

func child(what, log string) Spec {
	return Spec{Name: what, Binary: os.Args[0], Env: []string{behave + "=" + what}, Log: log}
}

func alive(pid int) bool { return syscall.Kill(pid, 0) == nil }

func TestKillAndClose(t *testing.T) {
	dir := t.TempDir()
	s := New()
	defer s.Close()
	first, err := s.Start(child("sleep", filepath.Join(dir, "1")))
	if err != nil {
		t.Fatal(err)
	}
	second, err := s.Start(child("sleep", filepath.Join(dir, "2")))
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Running()) != 2 {
		t.Errorf("running: %v", s.Running())
	}
	first.Kill()
	<-first.Ended()
	first.Kill() // harmless
	if len(s.Died()) != 0 {
		t.Error("a process that was killed counts as one that died")
	}
	s.Close()
	s.Close()
	if alive(first.PID()) || alive(second.PID()) {
		t.Error("a process has outlived Close")
	}
	if _, err := s.Start(child("sleep", filepath.Join(dir, "3"))); !errors.Is(err, ErrClosed) {
		t.Errorf("start after Close: %v", err)
	}
}

func TestEarlyEnd(t *testing.T) {
	s := New()
	defer s.Close()
	p, err := s.Start(child("fail", filepath.Join(t.TempDir(), "log")))
	if err != nil {
		t.Fatal(err)
	}
	err = p.Ready(t.Context(), func(context.Context) error { return errors.New("refused") })
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "the disk is on fire") {
		t.Errorf("the end is not told: %v", err)
	}
	if died := s.Died(); len(died) != 1 || died[0] != p {
		t.Errorf("died: %v", died)
	}
}

func TestReady(t *testing.T) {
	s := New()
	defer s.Close()
	p, err := s.Start(child("sleep", filepath.Join(t.TempDir(), "log")))
	if err != nil {
		t.Fatal(err)
	}
	probe := func(context.Context) error {
		if !strings.Contains(p.Tail(1), "awake") {
			return errors.New("still asleep")
		}
		return nil
	}
	if err := p.Ready(t.Context(), probe); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	err = p.Ready(ctx, func(context.Context) error { return errors.New("still busy") })
	if err == nil || !strings.Contains(err.Error(), "still busy") {
		t.Errorf("what was said last is not told: %v", err)
	}
}

func TestRun(t *testing.T) {
	s := New()
	defer s.Close()
	_, err := s.Run(t.Context(), child("fail", ""))
	if err == nil || !strings.Contains(err.Error(), "the disk is on fire") {
		t.Errorf("a command that fails: %v", err)
	}
	if len(s.Died()) != 0 {
		t.Error("a command that ended counts as a process that died")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Run(ctx, child("sleep", "")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a command that is interrupted: %v", err)
	}
	if len(s.Running()) != 0 {
		t.Error("a command has outlived its context")
	}
}

func TestPlainWords(t *testing.T) {
	s := New()
	defer s.Close()
	_, err := s.Start(Spec{Name: "x", Binary: "/none/entente", Log: filepath.Join(t.TempDir(), "log")})
	if err == nil || !strings.Contains(err.Error(), "/none/entente") || !strings.Contains(err.Error(), "missing") {
		t.Errorf("a missing binary: %v", err)
	}
	if _, err := os.Stat("/dev/full"); err == nil {
		err := plain(fmt.Errorf("write: %w", syscall.ENOSPC))
		if !strings.Contains(err.Error(), "disk is full") {
			t.Errorf("a full disk: %v", err)
		}
	}
}

// When the runner is killed with SIGKILL it can end nobody: the kernel must.
func TestNothingOutlivesTheRunner(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the kernel kills orphans on Linux only")
	}
	dir := t.TempDir()
	parent := exec.Command(os.Args[0], dir)
	parent.Env = append(os.Environ(), behave+"=parent")
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 32)
	n, err := out.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(line[:n])))
	if err != nil {
		t.Fatalf("%q", line[:n])
	}
	if !alive(pid) {
		t.Fatal("the child does not run")
	}
	parent.Process.Kill()
	parent.Wait()
	for start := time.Now(); running(pid); time.Sleep(5 * time.Millisecond) {
		if time.Since(start) > 5*time.Second {
			t.Fatalf("process %d has outlived the runner", pid)
		}
	}
}

// running: it exists and is no zombie that nobody waits for.
func running(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(after, "Z")
}

func TestMemory(t *testing.T) {
	m, err := MemoryOf(os.Getpid())
	if runtime.GOOS != "linux" {
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Error(err)
		}
		return
	}
	if err != nil || m.RSS < 1<<20 || m.PSS <= 0 || m.PSS > m.RSS {
		t.Errorf("%+v, %v", m, err)
	}
}
