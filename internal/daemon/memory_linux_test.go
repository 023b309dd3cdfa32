package daemon

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

func init() { children["DAEMON_TEST_MEMORY"] = beLookedAt }

// beLookedAt is the process of TestSealMemory.
func beLookedAt(mode string) int {
	if mode == "sealed" {
		if err := SealMemory(); err != nil {
			fmt.Println(err)
			return 1
		}
	}
	fmt.Println("ready")
	time.Sleep(time.Minute)
	return 0
}

// A sealed process leaves no core and lets nobody of its user look at it; one that is
// not sealed does both.
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
