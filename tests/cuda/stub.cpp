// A CUDA that is there and does nothing, for torch's CPU build: fake tensors and the autograd engine
// ask for a device guard and for hooks. Pinned memory is ordinary memory that is remembered.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>

#include <iterator>
#include <map>
#include <mutex>

namespace {

std::mutex pins_lock;
std::map<const char*, size_t> pins;  // starts and sizes

void unpin(void* start) {
  {
    std::lock_guard<std::mutex> guard(pins_lock);
    pins.erase(static_cast<const char*>(start));
  }
  c10::free_cpu(start);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* start = c10::alloc_cpu(size);
    if (start) {
      std::lock_guard<std::mutex> guard(pins_lock);
      pins[static_cast<const char*>(start)] = size;
    }
    return {start, start, &unpin, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};

bool is_pinned(const void* address) {
  std::lock_guard<std::mutex> guard(pins_lock);
  auto place = static_cast<const char*>(address);
  auto next = pins.upper_bound(place);
  if (next == pins.begin()) return false;
  auto pin = std::prev(next);
  return place < pin->first + pin->second;
}

}  // namespace

namespace at {

struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
  Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
};
REGISTER_CUDA_HOOKS(CUDAHooks)

struct CUDAGuard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static Device only() { return Device(c10::DeviceType::CUDA, 0); }
  static Stream stream() { return Stream(Stream::DEFAULT, only()); }
  Device getDevice() const override { return only(); }
  Device exchangeDevice(Device) const override { return only(); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, CUDAGuard)

}  // namespace at
