package workloadattest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// seen are a process's selectors as text, without those that could not be seen.
func seen(p *Process) (list []string) {
	for _, s := range p.Selectors() {
		if s.Err == nil {
			list = append(list, s.Kind+":"+s.Value)
		}
	}
	return list
}

// What is shown of a process is exactly what it satisfies, one by one and together.
func TestSelectorsAreWhatIsSatisfied(t *testing.T) {
	attr := &syscall.SysProcAttr{}
	want := []string{"unix:uid:" + strconv.Itoa(os.Getuid())}
	if os.Getuid() == 0 {
		attr.Credential = &syscall.Credential{Uid: 4711, Gid: 4712, Groups: []uint32{4713, 4714}}
		want = []string{"unix:uid:4711", "unix:gid:4712", "unix:group:4713", "unix:group:4714"}
	}
	l := tcpListener(t)
	o := start(t, "dial-tcp", l.Addr().String(), attr)
	o.line(t)
	a := New()
	p, err := a.PID(o.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	cmdline := sha256.Sum256([]byte(o.path + "\x00"))
	want = append(want, "unix:path:"+o.path, "unix:sha256:"+digestOf(t, o.path), "unix:cmdline:"+hex.EncodeToString(cmdline[:]))
	got := seen(p)
	for _, selector := range want {
		if !slices.Contains(got, selector) {
			t.Errorf("%s is not seen", selector)
		}
	}
	for _, selector := range got {
		if err := p.Satisfies([]string{selector}); err != nil {
			t.Errorf("seen and not satisfied: %v", err)
		}
	}
	if err := p.Satisfies(got[:min(len(got), 16)]); err != nil {
		t.Error(err)
	}
	for _, other := range []string{"unix:group:4712", "unix:cmdline:" + strings.Repeat("0", 64), "systemd:unit:entente-nobody.service", "container:id:" + idA, "run:id:abcdefghijklmnopqrst"} {
		if p.Satisfies([]string{other}) == nil {
			t.Errorf("%s is satisfied", other)
		}
	}
	if _, err := a.PID(1 << 22); err == nil {
		t.Error("a process that is not there was attested")
	}
	o.end()
	if got := seen(p); len(got) > 0 {
		t.Errorf("of a process that has ended: %v", got)
	}
}

// A real cgroup as the service manager and docker would make it.
func TestRealCgroup(t *testing.T) {
	root := ""
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(dir + "/cgroup.procs"); err == nil {
			root = dir
		}
	}
	if root == "" || os.Getuid() != 0 {
		t.Skip("needs cgroup v2 and root, to make a cgroup")
	}
	for path, want := range map[string]string{
		"entente-test.slice/entente-test.service":                  "systemd:unit:entente-test.service",
		"entente-test.slice/docker-" + idA + ".scope":              "container:id:" + idA,
		"entente-test.slice/mine.service/docker-" + idB + ".scope": "systemd:unit:mine.service",
	} {
		dir := filepath.Join(root, path)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Skipf("cannot make a cgroup: %v", err)
		}
		cmd := exec.Command("sleep", "60")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
			for ; dir != root; dir = filepath.Dir(dir) {
				os.Remove(dir)
			}
		})
		p, err := New().PID(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if err := p.Satisfies([]string{want}); err == nil {
			t.Errorf("%s before it is there", want)
		}
		if err := os.WriteFile(dir+"/cgroup.procs", []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
			t.Fatal(err)
		}
		if err := p.Satisfies([]string{want}); err != nil {
			t.Error(err)
		}
		if got := seen(p); !slices.Contains(got, want) || slices.Contains(got, "container:id:"+idB) {
			t.Errorf("seen: %v", got)
		}
		if strings.Contains(path, idB) {
			if err := p.Satisfies([]string{"container:id:" + idB}); err == nil || !strings.Contains(err.Error(), "mine.service") {
				t.Errorf("a container that a unit's own user could have made: %v", err)
			}
		}
	}
}

// What a registered process starts belongs to its run, at any depth, and nobody else.
func TestRun(t *testing.T) {
	const id = "abcdefghijklmnopqrstuvwxyz"
	selectors := []string{"unix:uid:" + strconv.Itoa(os.Getuid()), "run:id:" + id}
	a := New()
	// A shell, a shell below it, and a sleep below that.
	sh := exec.Command("sh", "-c", "sh -c 'sleep 60 & echo $!; wait'; true")
	out, err := sh.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := sh.Start(); err != nil {
		t.Fatal(err)
	}
	var deep int
	if _, err := fmt.Fscan(out, &deep); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		syscall.Kill(deep, syscall.SIGKILL)
		sh.Process.Kill()
		sh.Wait()
	})
	stranger := exec.Command("sleep", "60")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stranger.Process.Kill(); stranger.Wait() })

	check := func(pid int) error {
		p, err := a.PID(pid)
		if err != nil {
			return err
		}
		defer p.Close()
		return p.Satisfies(selectors)
	}
	if err := check(sh.Process.Pid); err == nil {
		t.Error("before it was registered")
	}
	root, err := a.PID(sh.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	release, err := a.Register(id, root)
	if err != nil {
		t.Fatal(err)
	}
	for name, pid := range map[string]int{"itself": sh.Process.Pid, "its grandchild": deep} {
		if err := check(pid); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, pid := range map[string]int{"a sibling": stranger.Process.Pid, "its parent": os.Getpid()} {
		if err := check(pid); err == nil {
			t.Errorf("%s belongs to it", name)
		}
	}
	if _, err := a.Register(id, root); err == nil {
		t.Error("an id was given twice")
	}
	// When what it began with has ended, what is left is nobody's.
	sh.Process.Kill()
	sh.Wait()
	if err := check(deep); err == nil {
		t.Error("an orphan still belongs to it")
	}
	release()
	if err := check(deep); err == nil {
		t.Error("after it was released")
	}
}

func TestParseParent(t *testing.T) {
	own, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	if parent, err := parseParent(own); err != nil || parent != os.Getppid() {
		t.Errorf("own: %d %v", parent, err)
	}
	for text, want := range map[string]int{"1 (x) S 4 5": 4, "1 ((x) S 9 9) R 7 5": 7} {
		if parent, err := parseParent([]byte(text)); err != nil || parent != want {
			t.Errorf("%q: %d %v", text, parent, err)
		}
	}
	for _, bad := range []string{"", "1 (x", "1 (x) S", "1 (x) S -1 2", "1 (x) S x"} {
		if _, err := parseParent([]byte(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}
