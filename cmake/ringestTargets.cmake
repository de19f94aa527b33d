# The targets of ringest, for the build tree and for the installed package.

# What libringest.a needs from the system. The compiler adds the unwinder itself: libgcc_s, or libgcc_eh with -static.
set(RINGEST_SYSTEM_LIBRARIES -lutil -lrt -lpthread -lm -ldl -lc)

# ringest_add_targets(LIBDIR INCLUDEDIR [GLOBAL])
function(ringest_add_targets libdir includedir)
  add_library(ringest::device INTERFACE IMPORTED ${ARGN})
  set_target_properties(ringest::device PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${includedir}")

  add_library(ringest::ringest SHARED IMPORTED ${ARGN})
  set_target_properties(ringest::ringest PROPERTIES
    IMPORTED_LOCATION "${libdir}/libringest.so.${RINGEST_VERSION}"
    IMPORTED_SONAME "libringest.so.${RINGEST_SOVERSION}"
    INTERFACE_INCLUDE_DIRECTORIES "${includedir}")

  add_library(ringest::ringest_static STATIC IMPORTED ${ARGN})
  set_target_properties(ringest::ringest_static PROPERTIES
    IMPORTED_LOCATION "${libdir}/libringest.a"
    INTERFACE_INCLUDE_DIRECTORIES "${includedir}"
    INTERFACE_LINK_LIBRARIES "${RINGEST_SYSTEM_LIBRARIES}")
endfunction()
