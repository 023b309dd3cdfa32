package daemon

import (
	"bufio"
	"bytes"
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

func init() { children["DAEMON_TEST_MEMORY"] = beLookedAt }

// beLookedAt is the process that is looked at, or the one that looks.
func beLookedAt(mode string) int {
	switch mode {
	case "sealed":
		if err := SealMemory(); err != nil {
			fmt.Println(err)
			return 1
		}
	case "look":
		found, err := look(os.Getenv("DAEMON_TEST_PID"))
		fmt.Println(found, err)
		return 0
	}
	// A key that stands in memory only: it is put together here.
	key := bytes.Repeat([]byte("planted"), 3)
	key = append(key, " key"...)
	fmt.Println("ready")
	time.Sleep(time.Minute)
	runtime.KeepAlive(key)
	return 0
}

const planted = "plantedplantedplanted key"

// look searches another process's memory as a debugger does.
func look(pid string) (found bool, err error) {
	maps, err := os.ReadFile("/proc/" + pid + "/maps")
	if err != nil {
		return false, err
	}
	memory, err := os.Open("/proc/" + pid + "/mem")
	if err != nil {
		return false, err
	}
	defer memory.Close()
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var rights string
		if n, _ := fmt.Sscanf(line, "%x-%x %s", &from, &to, &rights); n != 3 || !strings.HasPrefix(rights, "rw") || to-from > 64<<20 {
			continue
		}
		region := make([]byte, to-from)
		n, _ := memory.ReadAt(region, from)
		found = found || bytes.Contains(region[:n], []byte(planted))
	}
	return found, nil
}

// A debugger of the same user is refused by a sealed process. One that is not sealed
// gives it the key.
func TestSealMemoryFromDebuggers(t *testing.T) {
	// Root may look at everything: be somebody else.
	dir, err := os.MkdirTemp("", "memory")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	attributes := &syscall.SysProcAttr{}
	if os.Getuid() == 0 {
		const nobody = 65534
		attributes.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
		if err := os.Chown(dir, nobody, nobody); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	image, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "memory.test")
	if err := os.WriteFile(binary, image, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(binary, 0o755); err != nil { // whatever the umask
		t.Fatal(err)
	}
	for _, mode := range []string{"sealed", "open"} {
		child := exec.Command(binary)
		child.Env, child.Dir, child.SysProcAttr = append(os.Environ(), "DAEMON_TEST_MEMORY="+mode), dir, attributes
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { child.Process.Kill(); child.Wait() })
		if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
			t.Fatalf("%s: %q, %v", mode, line, err)
		}
		debugger := exec.Command(binary)
		debugger.Env = append(os.Environ(), "DAEMON_TEST_MEMORY=look", "DAEMON_TEST_PID="+strconv.Itoa(child.Process.Pid))
		debugger.Dir, debugger.SysProcAttr = dir, attributes
		said, err := debugger.CombinedOutput()
		t.Logf("%s: %s", mode, bytes.TrimSpace(said))
		switch {
		case err != nil:
			t.Errorf("%s: %v", mode, err)
		case mode == "sealed" && !bytes.Contains(said, []byte("permission denied")):
			t.Errorf("a debugger of the same user reads a sealed process: %s", said)
		case mode == "open" && bytes.Contains(said, []byte("permission denied")):
			t.Skip("NOT RUN: this machine lets nobody debug his own processes")
		case mode == "open" && !bytes.HasPrefix(said, []byte("true")):
			t.Errorf("control: the memory of an open process does not show its key: %s", said)
		}
	}
}

// A sealed process leaves no core when it crashes, whatever limit it was started with.
func TestSealMemory(t *testing.T) {
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, mode := range []string{"sealed", "open"} {
		child := exec.Command("sh", "-c", `ulimit -c unlimited 2>/dev/null; exec "$0"`, binary)
		child.Env = append(os.Environ(), "DAEMON_TEST_MEMORY="+mode, "GOTRACEBACK=crash")
		child.Dir = t.TempDir()
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		line := make([]byte, 6)
		if _, err := out.Read(line); err != nil || !bytes.Equal(line, []byte("ready\n")) {
			t.Fatalf("%s: %q, %v", mode, line, err)
		}
		limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", child.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		core := ""
		for line := range strings.Lines(string(limits)) {
			if strings.HasPrefix(line, "Max core file size") {
				core = strings.Join(strings.Fields(line)[4:6], " ")
			}
		}
		child.Process.Signal(syscall.SIGABRT)
		child.Wait()
		status, _ := child.ProcessState.Sys().(syscall.WaitStatus)
		t.Logf("%s: core limit %s, core dumped: %v", mode, core, status.CoreDump())
		if mode == "sealed" && (core != "0 0" || status.CoreDump()) {
			t.Errorf("a sealed process has the core limit %q, core dumped: %v", core, status.CoreDump())
		}
		if mode == "open" && core == "0 0" {
			t.Log("control: this machine allows no core at all")
		}
	}
}
